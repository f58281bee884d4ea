"""What is read: the objects of a bucket and, for the native file system, the same files again on local disk."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.reader import ABSENT_BYTE
from tests.benchmarks.scale import MIB, size_text
from tests.services.buckets import uploaded

BUCKET = "bench"
_BLOCK = 8 * MIB


@dataclass(frozen=True, slots=True)
class Data:
    """Files made when they are first asked for. They contain all bytes but one, so that a scan reads them whole."""

    root: Path

    @property
    def store(self) -> Path:
        """The directory that the endpoints serve."""
        return self.root / "store"

    @property
    def native(self) -> Path:
        """The same files, in no bucket."""
        return self.root / "native"

    def file(self, size: int, name: str = "file") -> Path:
        """A file of *size* bytes, relative to the bucket."""
        relative = Path("files", f"{name}-{size_text(size).replace(' ', '-')}")
        for path in self._both(relative):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, size)
        uploaded(self.store / BUCKET / relative)
        return relative

    def directory(self, count: int, size: int) -> Path:
        """A directory of *count* files of *size* bytes, relative to the bucket."""
        relative = Path("directories", f"{count}-of-{size}")
        for path in self._both(relative):
            path.mkdir(parents=True)
            each = content(size, 0)
            for number in range(count):
                (path / f"{number:06}").write_bytes(each)
                uploaded(path / f"{number:06}")
        return relative

    def size(self, relative: Path) -> int:
        """Bytes of a file, or of all in a directory."""
        return sum(path.stat().st_size for path in _files(self.store / BUCKET / relative))

    def heat(self, relative: Path) -> None:
        """Bring the objects into the page cache, so that the endpoint never waits for a disk."""
        for path in _files(self.store / BUCKET / relative):  # also one that is absolute
            heat(path)

    def chill(self, relative: Path) -> None:
        """Drop the native files from the page cache."""
        for path in _files(self.native / relative):
            chill(path)

    def _both(self, relative: Path) -> list[Path]:
        return [path for path in (self.store / BUCKET / relative, self.native / relative) if not path.exists()]


def heat(path: Path) -> None:
    """Have all of a file in memory."""
    buffer = bytearray(_BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def chill(path: Path) -> None:
    """Have nothing of a file in memory."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for number in range(-(-size // _BLOCK)):
            file.write(content(min(_BLOCK, size - number * _BLOCK), number))


def content(size: int, seed: int) -> bytes:
    """Random bytes, always the same, without the one that scans look for."""
    other = bytes((ABSENT_BYTE - 1,))
    return random.Random(seed).randbytes(size).replace(bytes((ABSENT_BYTE,)), other)
