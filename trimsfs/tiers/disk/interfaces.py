"""The interfaces of the disk tier: what each kind of caller needs of it. `DiskTier` has a component for each."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from trimsfs.tiers.blob import Blob
from trimsfs.types import ChunkRecord, Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """How much of a generation is here: ``disk_bytes`` in the blob, ``host_bytes`` in the page cache (None: unknown).

    ``verified``: every byte is here, was verified since the server started, and matches the store's ``digest``. The
    digest is None if not compared yet, and empty without one to compare with. ``handles`` counts open handles;
    ``users`` includes commands and fetches; ``uses`` counts all opens ever. ``last_used``: seconds since the epoch.
    """

    generation: Generation
    token: str
    disk_bytes: int
    host_bytes: int | None
    verified: bool
    digest: str | None
    pinned: bool
    handles: int
    users: int
    uses: int
    last_used: float


class KnownBlobs(Protocol):
    """Names blobs, and finds those that the tier knows: all in use, and the last used ones. Never waits."""

    def token(self, generation: Generation) -> str:
        """The token of a generation's blob."""

    def known(self, token: str) -> Blob | None:
        """The blob of this token, if the tier knows it; else None."""

    def __iter__(self) -> Iterator[Blob]:
        """The blobs that the tier knows. The caller neither awaits nor holds or releases one meanwhile."""


class BlobUse(KnownBlobs, Protocol):
    """Holds blobs, so that none is evicted while somebody reads it."""

    async def acquire(self, generation: Generation, *, opening: bool = False) -> Blob:
        """The blob of a generation, made if needed. The caller holds it until a matching `release`.

        *opening* is as of `FileOpens.use`. Raises CacheUnusableError when the disk fails.
        """

    def using(self, generation: Generation) -> AbstractAsyncContextManager[Blob]:
        """Hold the blob of a generation for the length of the block."""

    def release(self, blob: Blob) -> None:
        """Undo one `acquire`."""

    async def recall(self, generations: Sequence[Generation], *, checked: bool = False) -> list[Blob]:
        """The blobs of generations, loaded together. Nobody holds them: who uses them holds them before it awaits.

        With *checked*, an earlier server had them in use and had verified the chunks in the index, so they count as
        verified.
        """


class FileOpens(BlobUse, Protocol):
    """Holds blobs for programs, too, whose opens need not wait."""

    def unchanged(self, blob: Blob) -> bool:
        """Whether the tier knows a blob and no other program has changed its file: `use` may follow."""

    def use(self, blob: Blob, generation: Generation, *, opening: bool = True) -> None:
        """Acquire the blob of a generation, which is `unchanged`.

        Of names at several paths, bytes are fetched by the last one that a program used for *opening* it: others may
        need credentials that the store refuses.
        """


class Inspection(KnownBlobs, Protocol):
    """Holds blobs without recording a use: those looked at are no more wanted than before."""

    def inspecting(self, generation: Generation) -> AbstractAsyncContextManager[Blob]:
        """Hold the blob of a generation, made if needed, for the length of the block."""

    def inspecting_cached(self, generation: Generation) -> AbstractAsyncContextManager[Blob | None]:
        """`inspecting`, but makes no blob: None if there is none. Raises CacheUnusableError if nobody can tell."""


class ChunkWrites(Protocol):
    """Takes what is written to blobs. Space is reserved first; then the bytes are written, or the space is returned."""

    async def reserve(self, blob: Blob, size: int) -> bool:
        """Reserve space for *size* bytes to write to a blob; False if the disk or the tenant's share lacks it."""

    def wrote(self, blob: Blob, record: ChunkRecord) -> None:
        """Serve a chunk from now on: it is whole, and written to reserved space."""

    def unreserve(self, blob: Blob, size: int) -> None:
        """Return the reserved space of bytes that are not written after all."""

    async def write_failed(self, blob: Blob, size: int, error: OSError, *, last: bool) -> None:
        """Handle a failed write of *size* reserved bytes: if the disk is full, make space for a retry, if any.

        Otherwise, also after the *last* try, `reserve` declines for a while.
        """

    def refused(self, blob: Blob) -> str | None:
        """Count a chunk that is not cached, because there is no space. Returns what its tenant can do, if it has a
        share and that has no space for the rest of the blob."""


class Room(Protocol):
    """Tells how much room the disk has. Never waits."""

    def sizes(self) -> tuple[int, int]:
        """Bytes for models on the disk: in total, and those that may be used without an eviction."""

    def full(self, generation: Generation) -> bool:
        """Whether the disk recently had no space for an object of the same tenant, or a write failed."""

    def room_ahead(self, generation: Generation, here: int) -> int:
        """Bytes that prefetches for an object's load may take, including the bytes that are *here*.

        That is the free space, or a quarter of the tenant's space if that is more and the policy evicts.
        """


class ChunkChecks(Protocol):
    """Discards chunks whose bytes are not those that were written; they are fetched again."""

    async def check_chunk(self, blob: Blob, chunk: int, crc: int | None) -> bool:
        """Compare a chunk's CRC32C (None: unreadable) with its record. If they differ, discard it and return False."""

    async def check_holes(self, blob: Blob) -> None:
        """Discard chunks in holes: a truncation before the last chunks arrived has left zeros."""


class Durability(Protocol):
    """Waits until what is written would survive the server, or the host."""

    async def wait_until_recorded(self, blob: Blob) -> None:
        """Wait until a blob's written chunks are in the index. Raises CacheUnusableError when they cannot be."""

    async def sync_blob(self, blob: Blob) -> bool:
        """Sync a blob to the disk; returns whether all its chunks have reached it."""


class Residencies(Protocol):
    """Tells what is on this host. Raises CacheUnusableError when the index fails."""

    async def all(self) -> list[Residency]:
        """The residency of every blob in the index, by key."""

    async def of(self, generation: Generation) -> Residency:
        """The residency of one generation."""


class Retention(Residencies, Protocol):
    """Keeps blobs or removes them on command. Raises CacheUnusableError when the disk fails."""

    async def pin(self, blob: Blob, pinned: bool) -> None:
        """Pin or unpin a blob."""

    async def evict(self, generation: Generation) -> int:
        """Remove a blob; returns the bytes freed. Raises InUseError when it is open or pinned."""
