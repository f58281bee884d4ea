"""A blob: the local file of one generation of an object, and the state of each of its chunks."""

import enum
import errno
import os
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from trimsfs.checksums import crc32c_of_file
from trimsfs.errors import CacheUnusableError
from trimsfs.telemetry.open_trace import Activity
from trimsfs.tiers.health import Health
from trimsfs.tiers.mapping import mapped
from trimsfs.tiers.ranges import chunk_count, chunk_length, chunk_span, chunks_of
from trimsfs.types import CHUNK_SIZE, ChunkRecord, Generation

_FLAGS = os.O_RDWR | os.O_CLOEXEC


class ChunkState(enum.IntEnum):
    """The state of a chunk of a blob."""

    MISSING = 0
    UNVERIFIED = 1
    """Recorded by an earlier server: it must pass its checksum before it is served."""
    VERIFIED = 2


class FileChange(enum.Enum):
    """How another program changed a blob's file, as stat shows it."""

    NONE = enum.auto()
    TOUCHED = enum.auto()
    """The file was changed while the server had it closed: its chunks must pass their checksums again."""
    RESIZED = enum.auto()
    REPLACED = enum.auto()
    """The file was removed, or another one is in its place."""


class OpenFiles(OrderedDict["Blob", None]):
    """The blobs of a tier whose files are open, at most ``most``; the one opened longest ago is first."""

    most = sys.maxsize

    @property
    def full(self) -> bool:
        """Whether no more files should be opened."""
        return len(self) >= self.most


class Blob:
    """A sparse file of the object's size, and the states of its chunks.

    Once a chunk is VERIFIED, its bytes never change. ``users`` counts the handles, flights and commands that need the
    blob to stay, and ``handles`` the handles among them. ``passed`` counts the handles whose reads the kernel passes
    through. Only the event loop touches these. A blob without a file (``attached`` is False: the cache could not make
    one, or the object is empty) never holds a chunk. ``backing_id`` is the kernel's id of the file while opens are
    passed through to it, else 0. ``opened_again`` counts further descriptors of the server: leases do not tell them
    from those of programs.

    The server may close the file while no reader goes through the server; it keeps the chunks' states, and `fileno`
    reopens the file. A server knows up to 131,072 blobs, hence the slots.
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
        "activity",
        "backing_id",
        "chunk_size",
        "generation",
        "handles",
        "health",
        "opened_again",
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
        self.opened_again = 0
        self.health = Health()
        self.resizes = 0
        """How often `restore_size` ran: bytes written around such a time may be lost."""
        self._directory = self._name = ""
        self._descriptor: int | None = None
        self._view: memoryview | None = None
        self._identity = (0, 0)
        """Inode number and ctime of the file when it was closed."""
        self._open_files = OpenFiles()
        self.activity: Activity | None = None
        """What is under way for the blob, for traces of its opens."""

    @property
    def attached(self) -> bool:
        return self._name != ""

    @property
    def opened(self) -> bool:
        """Whether the server has the file open."""
        return self._descriptor is not None

    def fileno(self) -> int:
        """The descriptor of the attached file, reopened if needed; valid while a user reads or writes through it.

        While the file is closed, only the event loop may call this. Raises OSError when the file cannot be opened.
        """
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
            raise OSError(errno.ESTALE, "another program replaced its file in the cache")
        return descriptor

    @property
    def _path(self) -> str:
        return f"{self._directory}/{self._name}"

    def open_direct(self) -> int:
        """A new descriptor that reads the file from the disk, past the page cache if the file system supports it.

        Raises OSError.
        """
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            return os.dup(self.fileno())

    def _has_opened(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._open_files[self] = None

    def join(self, open_files: OpenFiles) -> None:
        """Join a tier, after a thread has loaded the blob: the event loop may close its file from now on."""
        self._open_files = open_files
        if self._descriptor is not None:
            open_files[self] = None

    @property
    def complete(self) -> bool:
        """Whether every byte can be served from the file."""
        return self._verified == len(self.states)

    @property
    def verified(self) -> bool:
        """Whether the blob is complete, compared with the store's digest if there is one, and not in quarantine."""
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
        """Find the file, or make it if it is missing, has the wrong size or must be *new*; return whether it was found.

        Leaves a new file open, and a found one only with *keep_open*. Raises OSError.
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
                raise OSError("another program truncated its file in the cache")
            self._attached_to(path, descriptor)
        else:
            self._identity = status.st_ino, status.st_ctime_ns
            self._name_file(path)
        return True

    def _make_file(self, path: str | Path) -> None:
        """Make a new file. Unlinks an existing one and never truncates it, as programs may still map it."""
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

    def cut_surplus(self) -> None:
        """Cut off bytes that somebody appended: the kernel may serve them, and a repair leaves them. Raises OSError."""
        if self.attached:
            status = os.stat(self._path) if self._descriptor is None else os.fstat(self._descriptor)
            if status.st_size > self.generation.size:
                self.restore_size()

    def change(self) -> FileChange:
        """How another program changed the file. Raises OSError."""
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
        """Restore the size of the file; truncated bytes then read as zeros. Raises OSError."""
        self.resizes += 1
        os.truncate(self.fileno(), self.generation.size)

    def close_file(self) -> None:
        """Close the file until `fileno` reopens it. Views in use keep its mapping."""
        if self._descriptor is not None:
            try:
                status = os.fstat(self._descriptor)
                self._identity = status.st_ino, status.st_ctime_ns
            except OSError:
                self._identity = (0, 0)  # `change` then reports REPLACED
            self._close(self._descriptor)

    def detach(self) -> None:
        """Close the file for good. Views in use keep its mapping."""
        if self._descriptor is not None:
            self._close(self._descriptor)
        self._directory = self._name = ""

    def _close(self, descriptor: int) -> None:
        os.close(descriptor)
        self._descriptor = self._view = None
        self._open_files.pop(self, None)

    def recall(self, records: Iterable[ChunkRecord]) -> None:
        """Mark the chunks that the index has recorded as UNVERIFIED."""
        for record in records:
            self.states[record.chunk] = ChunkState.UNVERIFIED
            self._crcs[record.chunk] = record.crc

    def trust(self) -> None:
        """Mark recorded chunks as VERIFIED: the earlier server has verified them."""
        for chunk, state in enumerate(self.states):
            if state == ChunkState.UNVERIFIED:
                self.states[chunk] = ChunkState.VERIFIED
                self._verified += 1

    def readable(self, start: int, stop: int) -> bool:
        """Whether the bytes ``[start, stop)`` can be served from the file."""
        return all(self.states[chunk] == ChunkState.VERIFIED for chunk in self.chunks_of(start, stop))

    def view(self, start: int, stop: int) -> memoryview:
        """The bytes ``[start, stop)``, which must be readable, as a view of the file's mapping.

        Raises CacheUnusableError.
        """
        if self._view is None and (self._descriptor is not None or not self._open_files.full):
            with suppress(OSError):  # the kernel limits the mappings of a process
                self._view = mapped(self.fileno(), self.generation.size)
        if self._view is not None:
            return self._view[start:stop]
        try:
            return self._read(start, stop)
        except OSError as error:
            message = f"{self.generation.key}: cannot be read from the cache: {error.strerror}"
            raise CacheUnusableError(message) from error

    def _read(self, start: int, stop: int) -> memoryview:
        descriptor = self._reopened() if self._descriptor is None else os.dup(self._descriptor)
        try:
            return memoryview(os.pread(descriptor, stop - start, start))
        finally:
            os.close(descriptor)

    def commit(self, record: ChunkRecord) -> None:
        """Mark a chunk as VERIFIED: its bytes are written and match the checksum."""
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
        """Mark a chunk as MISSING: its bytes are wrong or lost."""
        self._verified -= self.states[chunk] == ChunkState.VERIFIED
        self.states[chunk] = ChunkState.MISSING

    def differing(self, chunks: Iterable[int]) -> list[int]:
        """Those of the *chunks* whose bytes on the disk fail their checksum. Raises OSError."""
        descriptor = self.open_direct()
        try:
            return [
                chunk
                for chunk in chunks
                if self.states[chunk] != ChunkState.MISSING
                and crc32c_of_file(descriptor, *self.span_of(chunk)) != self._crcs[chunk]
            ]
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Wait until all written bytes have reached the disk. Raises OSError."""
        if self.attached:
            os.fdatasync(self.fileno())
