"""A reader of a bucket's objects while things go wrong."""

import errno
import mmap
import os
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tests.reliability.objects import Objects
from tests.support.readers import PIECE, Report

FAILURES = {errno.EIO, errno.EACCES, errno.ESTALE}
"""What docs/semantics.md gives for what the store cannot give: which of them a fault may cause, its test says."""
KEPT = 4
"""Files that are open for longer than a round."""


class FaultReader:
    """Reads objects at random and compares every byte with the version that the file had when it was opened.

    *firm* are here before anything goes wrong: they are mapped as well, and no error is put up with, nor of listings of
    them if they are *listed*. *shaky* may fail for a while, but never be absent; *fleeting* are deleted at times.
    """

    def __init__(
        self,
        mount: Path,
        objects: Objects,
        seed: int,
        *,
        firm: Sequence[str] = (),
        shaky: Sequence[str] = (),
        fleeting: Sequence[str] = (),
        listed: bool = True,
    ) -> None:
        self._mount = mount
        self._objects = objects
        self._draw = random.Random(seed)
        self._names = [*firm, *shaky, *fleeting]
        self._firm, self._fleeting = frozenset(firm), frozenset(fleeting)
        self._listed = listed
        self._kept: list[tuple[str, int, int]] = []
        self.report = Report()

    def round(self) -> None:
        """One of each operation on one object, and a read of what has been open for longer."""
        name = self._draw.choice(self._names)
        directory, tolerated = os.path.dirname(name), self._tolerated(name)
        with self._putting_up_with(tolerated if self._listed else {*tolerated, *FAILURES}), self.report.timing("ls"):
            listed = set(os.listdir(self._mount / directory))
            expected = {one for one in self._objects.names(f"{directory}/") if one not in self._fleeting}
            lost = {os.path.basename(one) for one in expected} - listed
            self.report.compare("ls", f"{directory} without {lost}", not lost)
        with self._putting_up_with(FAILURES | {errno.ENOENT}), self.report.timing("ask"):
            os.stat(self._mount / directory / f"absent-{os.getpid()}-{self.report.operations}")
            self.report.compare("ask", "absent", right=False)
        with self._putting_up_with(tolerated):
            with self.report.timing("open"):
                descriptor = os.open(self._mount / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(descriptor).st_size
                self._read(name, descriptor, size)
                if name in self._firm:
                    self._map(name, descriptor, size)
                if self._draw.random() < 0.3:
                    self._kept.append((name, os.dup(descriptor), size))
            finally:
                os.close(descriptor)
        if self._kept:
            self._read_again()

    def _read_again(self) -> None:
        name, descriptor, size = self._draw.choice(self._kept)
        errors = self.report.errnos.total()
        with self._putting_up_with(self._tolerated(name)):
            self._read(name, descriptor, size)
        if len(self._kept) > KEPT or self.report.errnos.total() > errors:
            self._kept.remove((name, descriptor, size))
            os.close(descriptor)

    def _read(self, name: str, descriptor: int, size: int) -> None:
        offset = self._draw.randrange(size)
        wanted, found = min(PIECE, size - offset), b""
        while len(found) < wanted:  # what fails in the midst of a read ends it early, and the next one tells
            with self.report.timing("read"):
                more = os.pread(descriptor, wanted - len(found), offset + len(found))
            if not more:
                break
            found += more
        self._check("read", name, size, offset, found)

    def _map(self, name: str, descriptor: int, size: int) -> None:
        offset = self._draw.randrange(size)
        with self.report.timing("mmap"), closing(mmap.mmap(descriptor, size, prot=mmap.PROT_READ)) as mapping:
            found = mapping[offset : offset + PIECE]
        self._check("mmap", name, size, offset, found)

    def _check(self, kind: str, name: str, size: int, offset: int, found: bytes) -> None:
        expected = self._objects.expected(name, size, offset, PIECE)
        if found != expected:
            told = "no such version" if expected is None else first_difference(found, expected)
            self.report.compare(kind, f"{name} of {size} bytes at {offset}: {told}", right=False)

    def _tolerated(self, name: str) -> Collection[int]:
        if name in self._firm:
            return ()
        return FAILURES | {errno.ENOENT} if name in self._fleeting else FAILURES

    @contextmanager
    def _putting_up_with(self, numbers: Collection[int]) -> Iterator[None]:
        """What may happen is counted, but for absence where it is due."""
        try:
            yield
        except OSError as error:
            if error.errno is None or error.errno not in numbers:
                raise
            if error.errno != errno.ENOENT:
                self.report.errnos[errno.errorcode[error.errno]] += 1


def first_difference(found: bytes, expected: bytes) -> str:
    """Where and how bytes differ, for who has to find out why."""
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((number for number, (one, other) in pairs if one != other), min(len(found), len(expected)))
    sizes = f"{len(found)} for {len(expected)} bytes"
    return f"{sizes}, from {at} on {found[at : at + 8].hex()} for {expected[at : at + 8].hex()}"
