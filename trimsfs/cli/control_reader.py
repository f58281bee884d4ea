"""Reads the control files of a mount. If a server takes over before anything was read, the next one is asked."""

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path

MOST_OPENS = 6
"""How many servers in a row are asked: the keeper gives up after as many crashes."""
PROBLEMS = ("keeper", "store", "fleet", "cache", "quarantine")
"""What a mount may serve without, or not wholly. The file ``control`` tells of each why, as NAME_problem."""
_PIECE = 1 << 20


def read_bytes(path: Path, size: int = -1) -> bytes:
    """The first bytes of a control file. Raises OSError."""
    return next(_pieces_of(path, lambda file: [file.read(size)], again=False))


def read_lines(path: Path, *, again: bool) -> Iterator[bytes]:
    """The lines of a control file as they arrive. With *again*, they begin anew if its server ends between two.

    Raises OSError.
    """
    return _pieces_of(path, _lines, again=again)


def _lines(file: BufferedReader) -> Iterator[bytes]:
    text = b""
    while piece := file.read1(_PIECE):
        *lines, text = (text + piece).split(b"\n")
        yield from lines


def _pieces_of(path: Path, read: Callable[[BufferedReader], Iterable[bytes]], *, again: bool) -> Iterator[bytes]:
    for opens in itertools.count(1):
        yielded = False
        try:
            with path.open("rb") as file:
                for each in read(file):
                    yielded = True
                    yield each
        except OSError as error:
            if error.errno != errno.ESTALE or opens == MOST_OPENS or (yielded and not again):
                raise
        else:
            return
