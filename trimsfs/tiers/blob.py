"""A blob: the local file of one generation of an object, and what is known of each of its chunks."""

import enum
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from trimsfs.ranges import chunk_count, chunk_length, chunk_span, chunks_of
from trimsfs.tiers.health import Health
from trimsfs.types import CHUNK_SIZE, ChunkRecord, Generation


class ChunkState(enum.IntEnum):
    """What is known of a chunk of a blob."""

    MISSING = 0
    UNVERIFIED = 1
    """Recorded by an earlier server: its bytes must pass their checksum before they are served."""
    VERIFIED = 2


class Blob:
    """A sparse file of the object's size and what is known of its chunks.

    Once a chunk is VERIFIED its bytes never change. ``users`` counts handles, flights and commands that need the blob
    to stay; it is only touched from the event loop. A blob without a file (``attached`` is False: the cache could
    not make one, or the object is empty) never holds a chunk. ``backing_id`` is what the kernel knows the file by
    while opens are passed through to it, else 0.
    """

    def __init__(self, token: str, generation: Generation, *, chunk_size: int = CHUNK_SIZE) -> None:
        self.token = token
        self.generation = generation
        self.chunk_size = chunk_size
        self.pinned = False
        self.users = 0
        self.states = bytearray(chunk_count(generation.size, chunk_size))
        self._crcs = array("L", bytes(array("L").itemsize * len(self.states)))
        self._verified = 0
        self.backing_id = 0
        self.health = Health()
        self.resizes = 0
        """How often the size of the file was restored: what was being written at that time may be lost."""
        self._descriptor: int | None = None
        self._view: memoryview | None = None

    @property
    def attached(self) -> bool:
        return self._descriptor is not None

    def fileno(self) -> int:
        """The file's descriptor, while attached."""
        assert self._descriptor is not None
        return self._descriptor

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

    def attach(self, path: Path) -> bool:
        """Open the file, or make it anew; False when it was not there in its right size.

        A file of another size is replaced, never changed: programs may still map it.
        """
        flags = os.O_RDWR | os.O_CLOEXEC
        fitting = path.exists() and path.stat().st_size == self.generation.size
        if not fitting:
            path.unlink(missing_ok=True)
            flags |= os.O_CREAT | os.O_EXCL
        descriptor = os.open(path, flags, 0o600)
        try:
            if not fitting:
                os.truncate(descriptor, self.generation.size)
            mapping = mmap.mmap(descriptor, self.generation.size, prot=mmap.PROT_READ)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, ValueError):
                raise OSError("its file was truncated just now") from error
            raise
        self._descriptor = descriptor
        self._view = memoryview(mapping)
        return fitting

    @property
    def surplus(self) -> int:
        """Bytes that somebody has added to the file; negative when it was truncated. Raises OSError."""
        return 0 if self._descriptor is None else os.fstat(self._descriptor).st_size - self.generation.size

    def restore_size(self) -> None:
        """Restore the size of the file; what was truncated reads as zeros. Raises OSError."""
        self.resizes += 1
        os.truncate(self.fileno(), self.generation.size)

    def detach(self) -> None:
        """Close the file. Views that are still in use keep its mapping."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._view = None

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
        """The bytes ``[start, stop)``, which must be readable, as a view of the file's mapping."""
        assert self._view is not None
        return self._view[start:stop]

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
        if self._descriptor is not None:
            os.fdatasync(self._descriptor)
