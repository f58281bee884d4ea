"""Tar layers: which files lie where in one, from its headers, which are read by range; their content is not read."""

import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from trimsfs.errors import StoreUnavailableError
from trimsfs.text import printable

WINDOW, LARGEST_WINDOW = 1 << 16, 1 << 20
"""Bytes read at a header, at first and while the headers are close together."""
SHORT_HEADER = 3 * tarfile.BLOCKSIZE
"""Bytes of an ordinary header: its attributes, and itself."""
MOST_FILES = 100_000
"""Members of all layers of an artifact: more would take too much memory."""
MOST_TEXT = 64 << 20
"""Bytes of all their names, with those of the directories above them."""
PATH_MAX = 4096
"""Characters of the longest path; longer ones do not exist."""
TIMEOUT_S = 120.0
"""How long it may take to read the headers of all layers."""
_WHITEOUT = ".wh."
_KINDS: dict[Literal["file", "directory", "hard link", "symbolic link"], Callable[[tarfile.TarInfo], bool]] = {
    "file": tarfile.TarInfo.isreg,
    "directory": tarfile.TarInfo.isdir,
    "hard link": tarfile.TarInfo.islnk,
    "symbolic link": tarfile.TarInfo.issym,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file of ``size`` bytes from ``offset`` on in its layer, a directory, or a link to the path ``target``."""

    path: str
    kind: Literal["file", "directory", "hard link", "symbolic link"]
    offset: int
    size: int
    mtime: float
    target: str


class Budget:
    """What the headers of an artifact's layers may take together. Any thread may spend of it."""

    def __init__(self) -> None:
        self._files, self._text = MOST_FILES, MOST_TEXT
        self._deadline = time.monotonic() + TIMEOUT_S
        self._lock = threading.Lock()

    def spend(self, subject: str, *, files: int = 0, text: int = 0) -> None:
        """Raises StoreUnavailableError, which names the *subject*, if nothing is left."""
        with self._lock:
            self._files -= files
            self._text -= text
        if self._files < 0:
            raise StoreUnavailableError(f"{subject}: more than {MOST_FILES} files: pack fewer")
        if self._text < 0:
            raise StoreUnavailableError(f"{subject}: its names take {MOST_TEXT >> 20} MiB: pack fewer files")
        if time.monotonic() > self._deadline:
            raise StoreUnavailableError(f"{subject}: headers not read in {TIMEOUT_S:g} s: pack fewer files")


def members(fetch: Callable[[int, int], bytes], size: int, subject: str, budget: Budget) -> Iterator[Member]:
    """The members of an uncompressed tar archive of *size* bytes, without special files and paths that are too long.

    *fetch* gives bytes by offset and length. Raises StoreUnavailableError, which names the *subject*, for what is no
    archive, or one that cannot be shown.
    """
    file = _RangeFile(fetch, size, subject, budget)
    try:
        with tarfile.TarFile(fileobj=file) as archive:  # type: ignore[arg-type]  # it reads, seeks and tells
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # which would grow
                _check(member, size, subject)
                # Attributes of any length come before a member, and `tarfile` keeps some of them for all that follow.
                budget.spend(subject, files=1, text=max(0, file.header - SHORT_HEADER))
                file.header = 0
                if max(len(member.name), len(member.linkname)) > PATH_MAX:
                    continue
                budget.spend(subject, text=len(member.name) * (1 + member.name.count("/")))
                for kind, is_one in _KINDS.items():
                    if is_one(member):
                        yield Member(
                            path=member.name,
                            kind=kind,
                            offset=member.offset_data,
                            size=member.size,
                            mtime=member.mtime,
                            target=member.linkname,
                        )
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise StoreUnavailableError(f"{subject}: no tar header at byte {archive.offset}: push it again")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise StoreUnavailableError(
            f"{subject}: not an uncompressed tar archive: {printable(str(error))}: push it again"
        ) from error


def _check(member: tarfile.TarInfo, size: int, subject: str) -> None:
    """Raises StoreUnavailableError for a member that is not a range of the layer, or deletes files of other layers."""
    name = printable(member.name)
    if member.size < 0:
        raise StoreUnavailableError(f"{subject}: {name} has {member.size} bytes: push it again")
    if member.issparse():
        raise StoreUnavailableError(f"{subject}: {name} is sparse: pack it without `tar --sparse`")
    if member.isreg() and member.size > size - member.offset_data:
        raise StoreUnavailableError(f"{subject}: {name} is longer than the layer: push it again")
    if member.name.rpartition("/")[2].startswith(_WHITEOUT):
        raise StoreUnavailableError(f"{subject}: {name} deletes a file of another layer: squash the layers")


class _RangeFile:
    """A layer as the file that `tarfile` reads headers from: each window is one request."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, subject: str, budget: Budget) -> None:
        self._fetch = fetch
        self._budget = budget
        self._size = size
        self._subject = subject
        self._position = self._start = 0
        self._window = b""
        self._next_length = WINDOW
        self.header = 0
        """Bytes of the header that is being read, with all that belongs to it."""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, _whence: int = 0) -> int:
        self._position = position
        return position

    def read(self, count: int) -> bytes:
        self.header += count
        if count < 0 or self.header > LARGEST_WINDOW:
            raise ValueError(f"a header of {self.header} bytes")
        stop = min(self._position + count, self._size)
        if stop <= self._position:
            return b""
        if not self._start <= self._position <= stop <= self._start + len(self._window):
            self._read_window(stop)
        data = self._window[self._position - self._start : stop - self._start]
        self._position = stop
        return data

    def _read_window(self, stop: int) -> None:
        self._budget.spend(self._subject)
        # Behind the last window, headers are close together.
        near = self._start < self._position <= self._start + len(self._window)
        self._next_length = min(2 * self._next_length, LARGEST_WINDOW) if near else WINDOW
        length = min(max(self._next_length, stop - self._position), self._size - self._position)
        self._window, self._start = self._fetch(self._position, length), self._position
