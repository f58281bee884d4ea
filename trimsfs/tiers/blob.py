"""A blob: the local file of one generation of an object, and what is known of each of its chunks."""

import enum
import errno
import os
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from trimsfs.ranges import chunk_count, chunk_length, chunk_span, chunks_of
from trimsfs.tiers.health import Health
from trimsfs.tiers.mapping import mapped
from trimsfs.types import CHUNK_SIZE, ChunkRecord, Generation

_FLAGS = os.O_RDWR | os.O_CLOEXEC


class ChunkState(enum.IntEnum):
    """What is known of a chunk of a blob."""

    MISSING = 0
    UNVERIFIED = 1
    """Recorded by an earlier server: its bytes must pass their checksum before they are served."""
    VERIFIED = 2


class FileChange(enum.Enum):
    """What others have done to the file of a blob, as far as its status tells."""

    NONE = enum.auto()
    TOUCHED = enum.auto()
    """Something was changed while the server had it closed: its bytes must pass their checksums again."""
    RESIZED = enum.auto()
    REPLACED = enum.auto()
    """It was removed, or there is another file in its place."""


class OpenFiles(OrderedDict["Blob", None]):
    """The blobs of a tier whose files are open, the one opened longest ago first; *most* of them at once."""

    most = sys.maxsize

    @property
    def full(self) -> bool:
        """Whether no further file should stay open."""
        return len(self) >= self.most


class Blob:
    """A sparse file of the object's size and what is known of its chunks.

    Once a chunk is VERIFIED its bytes never change. ``users`` counts handles, flights and commands that need the blob
    to stay; ``handles`` those of them that are handles, ``passed`` those of these whose reads the kernel passes to the
    file by itself. All are only touched from the event loop. A blob without a file (``attached`` is False: the cache
    could not make one, or the object is empty) never holds a chunk. ``backing_id`` is what the kernel knows the file by
    while opens are passed through to it, else 0.

    The file of a blob that nobody reads through the server may be closed, which costs nothing of what is known of it:
    `fileno` opens it again. There are many blobs, so each is small.
    """

    __slots__ = (
        "__weakref__",
        "_crcs",
        "_descriptor",
        "_directory",
        "_identity",
        "_name",
        "_open_files",
        "_verified",
        "_view",
        "backing_id",
        "chunk_size",
        "generation",
        "handles",
        "health",
        "passed",
        "pinned",
        "resizes",
        "states",
        "token",
        "users",
    )

    def __init__(
        self,
        token: str,
        generation: Generation,
        *,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        self.token = token
        self.generation = generation
        self.chunk_size = chunk_size
        self.pinned = False
        self.users = 0
        self.handles = 0
        self.passed = 0
        self.states = bytearray(chunk_count(generation.size, chunk_size))
        self._crcs = array("L", bytes(array("L").itemsize * len(self.states)))
        self._verified = 0
        self.backing_id = 0
        self.health = Health()
        self.resizes = 0
        """How often the size of the file was restored: what was being written at that time may be lost."""
        self._directory = self._name = ""
        self._descriptor: int | None = None
        self._view: memoryview | None = None
        self._identity = (0, 0)
        """Inode number and time of the last change of the file when it was closed."""
        self._open_files = OpenFiles()

    @property
    def attached(self) -> bool:
        return self._name != ""

    @property
    def opened(self) -> bool:
        """Whether the server has the file open."""
        return self._descriptor is not None

    def fileno(self) -> int:
        """The file's descriptor, while attached; it may be closed once the blob has no user that reads it. From another
        thread than the event loop's, only while it is open. Raises OSError when the file cannot be opened again."""
        if self._descriptor is not None:
            return self._descriptor
        descriptor = self._reopened()
        self._has_opened(descriptor)
        return descriptor

    def _reopened(self) -> int:
        assert self.attached
        descriptor = os.open(self._path, _FLAGS)
        if os.fstat(descriptor).st_ino != self._identity[0]:
            os.close(descriptor)
            raise OSError(errno.ESTALE, "its file in the cache was replaced by another")
        return descriptor

    @property
    def _path(self) -> str:
        return f"{self._directory}/{self._name}"

    def _has_opened(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._open_files[self] = None

    def join(self, open_files: OpenFiles) -> None:
        """The blob, loaded in a thread, is one of a tier from now on, whose event loop may close its file."""
        self._open_files = open_files
        if self._descriptor is not None:
            open_files[self] = None

    @property
    def complete(self) -> bool:
        """Whether every byte can be served from the file."""
        return self._verified == len(self.states)

    @property
    def verified(self) -> bool:
        """Whether every byte is here and all of them have been compared with what the store says of them."""
        return self.complete and not self.health.quarantined and (self.health.compared or not self.states)

    @property
    def verified_bytes(self) -> int:
        """Bytes that can be served from the file."""
        full = self._verified * self.chunk_size
        if self.states and self.states[-1] == ChunkState.VERIFIED:
            full -= len(self.states) * self.chunk_size - self.generation.size
        return full

    @property
    def present_bytes(self) -> int:
        """Bytes in the file, verified or not."""
        return self.generation.size - self.missing_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that are not in the file."""
        missing = self.states.count(ChunkState.MISSING) * self.chunk_size
        if self.states and self.states[-1] == ChunkState.MISSING:
            missing -= len(self.states) * self.chunk_size - self.generation.size
        return missing

    def span_of(self, chunk: int) -> tuple[int, int]:
        """The bytes ``[start, stop)`` of a chunk."""
        return chunk_span(chunk, self.generation.size, self.chunk_size)

    def length_of(self, chunk: int) -> int:
        """The bytes in a chunk."""
        return chunk_length(chunk, self.generation.size, self.chunk_size)

    def chunks_of(self, start: int, stop: int) -> range:
        """The chunks that hold the bytes ``[start, stop)``."""
        return chunks_of(start, stop, self.chunk_size)

    def attach(self, path: str | Path, *, new: bool = False, keep_open: bool = True) -> bool:
        """Find the file, unless a *new* one is wanted, or make it; False when it was not there in its right size.

        A file that is made is open, one that is found if *keep_open*. Raises OSError.
        """
        status = None
        if not new:
            with suppress(FileNotFoundError):
                status = os.stat(path)
        if status is None or status.st_size != self.generation.size:
            self._make_file(path)
            return False
        if keep_open:
            descriptor = os.open(path, _FLAGS)
            if os.fstat(descriptor).st_size != self.generation.size:
                os.close(descriptor)
                raise OSError("its file was truncated just now")
            self._attached_to(path, descriptor)
        else:
            self._identity = status.st_ino, status.st_ctime_ns
            self._name_file(path)
        return True

    def _make_file(self, path: str | Path) -> None:
        """One that is there is replaced, never changed: programs may still map it."""
        try:
            descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            os.unlink(path)
            descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.truncate(descriptor, self.generation.size)
        except BaseException:
            os.close(descriptor)
            raise
        self._attached_to(path, descriptor)

    def _attached_to(self, path: str | Path, descriptor: int) -> None:
        self._name_file(path)
        self._has_opened(descriptor)

    def _name_file(self, path: str | Path) -> None:
        directory, name = os.path.split(path)
        self._directory = sys.intern(directory)
        self._name = self.token if name == self.token else name

    @property
    def surplus(self) -> int:
        """Bytes that somebody has added to the file; negative when it was truncated. Raises OSError."""
        if not self.attached:
            return 0
        status = os.stat(self._path) if self._descriptor is None else os.fstat(self._descriptor)
        return status.st_size - self.generation.size

    def change(self) -> FileChange:
        """What others have done to the file. Raises OSError."""
        if self._descriptor is not None:
            resized = os.fstat(self._descriptor).st_size != self.generation.size
            return FileChange.RESIZED if resized else FileChange.NONE
        if not self.attached:
            return FileChange.NONE
        try:
            status = os.lstat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return FileChange.REPLACED
        inode, changed_ns = self._identity
        if status.st_ino != inode:
            return FileChange.REPLACED
        if status.st_size != self.generation.size:
            return FileChange.RESIZED
        return FileChange.NONE if status.st_ctime_ns == changed_ns else FileChange.TOUCHED

    def restore_size(self) -> None:
        """Restore the size of the file; what was truncated reads as zeros. Raises OSError."""
        self.resizes += 1
        os.truncate(self.fileno(), self.generation.size)

    def close_file(self) -> None:
        """Close the file until somebody needs it. Views that are still in use keep its mapping."""
        if self._descriptor is not None:
            try:
                status = os.fstat(self._descriptor)
                self._identity = status.st_ino, status.st_ctime_ns
            except OSError:
                self._identity = (0, 0)  # it counts as replaced
            self._close(self._descriptor)

    def detach(self) -> None:
        """Give the file up. Views that are still in use keep its mapping."""
        if self._descriptor is not None:
            self._close(self._descriptor)
        self._directory = self._name = ""

    def _close(self, descriptor: int) -> None:
        os.close(descriptor)
        self._descriptor = self._view = None
        self._open_files.pop(self, None)

    def recall(self, records: Iterable[ChunkRecord]) -> None:
        """Take over the chunks that the index has recorded of the file."""
        for record in records:
            self.states[record.chunk] = ChunkState.UNVERIFIED
            self._crcs[record.chunk] = record.crc

    def trust(self) -> None:
        """The recorded chunks have passed their checksums since the host was started: serve them from now on."""
        for chunk, state in enumerate(self.states):
            if state == ChunkState.UNVERIFIED:
                self.states[chunk] = ChunkState.VERIFIED
                self._verified += 1

    def readable(self, start: int, stop: int) -> bool:
        """Whether the bytes ``[start, stop)`` can be served from the file."""
        return all(self.states[chunk] == ChunkState.VERIFIED for chunk in self.chunks_of(start, stop))

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)``, which must be readable, as a view of the file's mapping. Raises OSError."""
        if self._view is None and (self._descriptor is not None or not self._open_files.full):
            with suppress(OSError):  # a process has only so many mappings
                self._view = mapped(self.fileno(), self.generation.size)
        return self._read(start, stop) if self._view is None else self._view[start:stop]

    def _read(self, start: int, stop: int) -> memoryview:
        descriptor = self._reopened() if self._descriptor is None else os.dup(self._descriptor)
        try:
            return memoryview(os.pread(descriptor, stop - start, start))
        finally:
            os.close(descriptor)

    def commit(self, record: ChunkRecord) -> None:
        """The chunk's bytes are written and right: serve them from now on."""
        self._verified += self.states[record.chunk] != ChunkState.VERIFIED
        self._crcs[record.chunk] = record.crc
        self.states[record.chunk] = ChunkState.VERIFIED

    def crc(self, chunk: int) -> int:
        """The CRC32C that a chunk's bytes had when they were written."""
        return self._crcs[chunk]

    def records(self) -> Iterator[ChunkRecord]:
        """The chunks that are in the file, verified or not."""
        for chunk, state in enumerate(self.states):
            if state != ChunkState.MISSING:
                yield ChunkRecord(chunk=chunk, length=self.length_of(chunk), crc=self._crcs[chunk])

    def forget(self, chunk: int) -> None:
        """The chunk's bytes are wrong or lost: it is missing."""
        self._verified -= self.states[chunk] == ChunkState.VERIFIED
        self.states[chunk] = ChunkState.MISSING

    def sync(self) -> None:
        """Wait until what is written has reached the disk. Raises OSError."""
        if self.attached:
            os.fdatasync(self.fileno())
