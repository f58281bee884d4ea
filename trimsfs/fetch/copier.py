"""Copiers move bytes from a store into a file, chunk by chunk, and compute checksums of files.

`trimsfs.fetch.processes.worker_pool.WorkerPool` has fetch processes do that, each with a
`trimsfs.fetch.processes.thread_copier.ThreadCopier`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trimsfs.fetch.flights import Priority
from trimsfs.fetch.peers import PeerAnswer, PeerRequest
from trimsfs.stores.digests import Algorithm
from trimsfs.telemetry.open_trace import Spent
from trimsfs.types import ChunkRecord, Generation

Landed = Callable[[ChunkRecord], None]
"""Called with each chunk, or part of one, that is written in full."""
Arrived = Callable[[int], None]
"""Called more often, with the offset in the object up to which everything is written."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes ``[start, stop)`` of an object, in chunks, and the descriptor and position to copy them to."""

    start: int
    stop: int
    descriptor: int
    position: int
    chunk_size: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class LocalBytes:
    """Where another file has the bytes of an extent, and what they are: CRC32C and, unless it is empty, SHA-256."""

    descriptor: int
    position: int
    crc: int
    sha256: bytes


class Copier(Protocol):
    """Moves bytes. Raises OSError when the file, not the store, fails."""

    async def fetch(
        self,
        generation: Generation,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None = None,
        *,
        eager: bool = False,
        spent: Spent | None = None,
        priority: Priority | None = None,
    ) -> str | None:
        """Copy an extent of a generation. If it begins or ends within a chunk, or its request fails within one,
        *landed* gets a record of that part.

        *arrived* is only called for a streaming store, often if readers wait (*eager*). *spent* is filled in at the
        end. Without a *priority*, it is that of ordinary programs. Returns and raises what ``Store.read`` does, and
        OSError.
        """

    async def fetch_from_peer(
        self, request: PeerRequest, extent: Extent, landed: Landed, *, priority: Priority | None = None
    ) -> PeerAnswer:
        """Copy an extent of whole chunks from a peer; *landed* gets those whose bytes have the peer's checksums.

        Raises OSError, and TransientStoreError if this copier died.
        """

    async def ask_peer(self, request: PeerRequest) -> PeerAnswer:
        """Have a peer fetch chunks itself. Raises TransientStoreError if this copier died."""

    async def copy(self, source: LocalBytes, extent: Extent) -> bool:
        """Copy an extent from another file, if its bytes are those that *source* tells; returns whether they are.

        Raises OSError and StoreError.
        """

    async def checksum(self, descriptor: int, start: int, stop: int) -> int | None:
        """The CRC32C of the bytes ``[start, stop)`` of a file; None if the file is shorter. Raises OSError."""

    async def digest(
        self, descriptor: int, size: int, algorithm: Algorithm, part_size: int, *, idle: bool = False
    ) -> bytes | None:
        """The digest of a file, as from `trimsfs.stores.digests.compute`. Raises OSError and StoreError.

        With *idle*, it is computed only while no other process wants a core, if this copier can do that.
        """

    async def populate(self, descriptor: int, start: int, stop: int) -> None:
        """Read the bytes ``[start, stop)`` of a file into the page cache. Raises OSError."""
