"""Chunk checks: compares chunks of local copies with their checksums, and refetches and overwrites wrong ones."""

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import trio

from trimsfs.errors import BlobDamagedError, CacheUnusableError, StoreError, TrimsError
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.damage import Damage
from trimsfs.tiers.threads import Threads
from trimsfs.types import Generation

log = logging.getLogger(__name__)


TELL_S = 30.0
"""Longest run of *repaired*, in seconds."""


@dataclass(slots=True)
class Findings:
    """What checks have found in a blob since it was opened."""

    wrong_chunks: int = 0
    dropped: str | None = None
    """Why a wrong chunk could not be refetched and is missing now; None if none is."""


class Repair:
    """Finds and repairs wrong chunks in the blobs of a disk tier. A blob in use that cannot be repaired goes into
    *quarantine*.

    *unregister* removes a blob that nobody uses from the kernel's backing files. *repaired* hears of each file whose
    bytes were wrong.
    """

    def __init__(
        self,
        damage: Damage,
        fetcher: Fetcher,
        copier: Copier,
        retrying: Retrying,
        quarantine: Quarantine,
        *,
        unregister: Callable[[Blob], None],
        repaired: Callable[[Generation], Awaitable[object]],
    ) -> None:
        self._damage = damage
        self._fetcher = fetcher
        self._copier = copier
        self._retrying = retrying
        self._quarantine = quarantine
        self._unregister = unregister
        self._repaired = repaired
        self._threads = Threads(1)
        self._findings = WeakKeyDictionary[Blob, Findings]()
        self.repaired_chunks = 0
        """Chunks overwritten since the server started."""
        self.checked_bytes = 0
        """Bytes that checks have read from the disk since the server started."""

    def findings(self, blob: Blob) -> Findings:
        """What checks have found in a blob; later checks add to it."""
        return self._findings.setdefault(blob, Findings())

    async def refetch(self, blob: Blob) -> int:
        """Refetch all chunks of a blob and overwrite those that differ; the number of these.

        Raises StoreError and OSError.
        """
        changed = 0
        with held(blob):
            for chunk in range(len(blob.states)):
                if await self._refetch_chunk(blob, chunk, damaged=False):
                    changed += 1
                    await self._record_wrong(blob)
        return changed

    async def _refetch_chunk(self, blob: Blob, chunk: int, *, damaged: bool) -> bool:
        """Refetch a chunk, and overwrite it if it is *damaged* or its checksum differs; whether it was overwritten.

        Raises StoreError and OSError.
        """
        descriptor = os.memfd_create("trimsfs-repair")
        try:
            record = await self._fetcher.refetch(blob, chunk, descriptor)
            if not damaged and record.crc == blob.crc(chunk):
                return False
            if record.crc != blob.crc(chunk):
                await self._damage.set_digest(blob, None)
            start, _ = blob.span_of(chunk)
            await self._threads.run(_copy, descriptor, blob.fileno(), start, record.length)
        finally:
            os.close(descriptor)
        self.repaired_chunks += 1
        self._damage.repaired(blob, record)
        return True

    async def _record_wrong(self, blob: Blob) -> None:
        """Count a wrong chunk and call *repaired*, also for a check that is cancelled: GPU copies may have it, too.

        At once, as the server may be killed before it has checked the others, and the next one finds all right.
        """
        self.findings(blob).wrong_chunks += 1
        with trio.move_on_after(TELL_S, shield=True):
            try:
                await self._repaired(blob.generation)
            except TrimsError as error:
                log.error("%s", error)
            except Exception:  # a defect in *repaired* must not end the server
                log.exception("%s: pages and GPU copies of its wrong bytes not invalidated", blob.generation.key)

    async def check(self, blob: Blob, *, in_memory: bool = False, rate: int | None = None) -> bool:
        """Read a blob, which the caller holds, from disk, and repair chunks that fail their checksum.

        *in_memory* checks the page cache, too. With a *rate*, in bytes a second, the blob may be evicted between
        chunks; the result is then False. Raises CacheUnusableError.
        """
        for chunk in range(len(blob.states)):
            if blob.states[chunk] == ChunkState.MISSING:
                continue
            began = trio.current_time()
            with self._direct(blob) as descriptor:  # each anew: meanwhile nobody else is taken for one that maps it
                wrong = await self._check_chunk(blob, descriptor, chunk, in_memory=in_memory)
            if wrong:
                await self._record_wrong(blob)
            length = blob.length_of(chunk)
            self.checked_bytes += length
            if rate is not None:
                blob.users -= 1
                try:
                    await trio.sleep(max(0.0, length / rate - (trio.current_time() - began)))
                finally:
                    blob.users += 1
                if not blob.attached:
                    return False
        return True

    async def _check_chunk(self, blob: Blob, descriptor: int, chunk: int, *, in_memory: bool) -> bool:
        """Check a chunk and repair it; whether it was wrong."""
        crc = await self._checksum(blob, descriptor, chunk)
        if crc is not None and in_memory:
            seen = await self._checksum(blob, None, chunk)
            crc = crc if seen == crc else None
        if blob.states[chunk] == ChunkState.MISSING:
            return False  # a reader found the damage first
        if crc == blob.crc(chunk) and chunk not in blob.health.lost:
            if blob.states[chunk] == ChunkState.UNVERIFIED:
                await self._damage.check_chunk(blob, chunk, crc)
            return False
        await self._repair_chunk(blob, chunk)
        return True

    async def _checksum(self, blob: Blob, descriptor: int | None, chunk: int) -> int | None:
        """The checksum of a chunk, by this *descriptor* or that of the blob; None if it cannot be read."""
        try:
            descriptor = blob.fileno() if descriptor is None else descriptor
            return await self._retrying.call_locally(
                blob.generation.key,
                partial(self._copier.checksum, descriptor, *blob.span_of(chunk)),
            )
        except OSError as error:
            log.error("%s: cannot read chunk %d: %s", blob.generation.key, chunk, error)
            return None

    @contextmanager
    def _direct(self, blob: Blob) -> Iterator[int]:
        """A descriptor that reads a blob from the disk, past the page cache if the file system supports it."""
        try:
            descriptor = blob.open_direct()
        except OSError as error:
            raise CacheUnusableError(f"{blob.generation.key}: cannot be checked now: {error}") from error
        blob.opened_again += 1
        try:
            yield descriptor
        finally:
            os.close(descriptor)
            blob.opened_again -= 1

    async def _repair_chunk(self, blob: Blob, chunk: int) -> None:
        """Refetch a damaged chunk. If that fails, drop the chunk or put its blob into quarantine."""
        key = blob.generation.key
        log.error("%s: chunk %d is damaged in the cache: refetching", key, chunk)
        try:
            await self._refetch_chunk(blob, chunk, damaged=True)
        except (StoreError, OSError) as error:
            if blob.users == 1 or blob.states[chunk] == ChunkState.UNVERIFIED:
                if blob.users == 1:
                    self._unregister(blob)
                await self._damage.check_chunk(blob, chunk, None)
                self.findings(blob).dropped = str(error)
            else:
                self._quarantine.add(blob, BlobDamagedError(f"{key}: chunk {chunk} is damaged in the cache: {error}"))


@contextmanager
def held(blob: Blob) -> Iterator[None]:
    """Protect a blob from eviction for the length of the block, without recording a use."""
    blob.users += 1
    try:
        yield
    finally:
        blob.users -= 1


def _copy(source: int, target: int, start: int, length: int) -> None:
    """Copy the first *length* bytes of a file to *start* in another one."""
    done = 0
    while done < length:
        done += os.pwrite(target, os.pread(source, length - done, done), start + done)
