"""Repair: bytes of local copies that are wrong are refetched, and written over the wrong ones."""

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import trio

from trimsfs.errors import BlobDamagedError, CacheUnusableError, StoreError, TrimsError
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.integrity.quarantine import Quarantine
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.tiers.threads import Threads
from trimsfs.types import Generation

log = logging.getLogger(__name__)


TELL_S = 30.0
"""How long *repaired* may take."""


@dataclass(slots=True)
class Findings:
    """What checks have found of a blob since it was opened."""

    wrong_chunks: int = 0
    dropped: str | None = None
    """Why a wrong chunk could not be refetched and is missing now; None when none is."""


class Repair:
    """Finds and repairs what is wrong with the blobs of a disk tier. What is in use and cannot be repaired comes into
    the *quarantine*.

    *unregister* takes a blob that nobody uses from the kernel's backing files, *repaired* hears of files whose bytes
    were wrong.
    """

    def __init__(
        self,
        disk: DiskTier,
        fetcher: Fetcher,
        copier: Copier,
        retrying: Retrying,
        quarantine: Quarantine,
        *,
        unregister: Callable[[Blob], None],
        repaired: Callable[[Generation], Awaitable[object]],
    ) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._copier = copier
        self._retrying = retrying
        self._quarantine = quarantine
        self._unregister = unregister
        self._repaired = repaired
        self._threads = Threads(1)
        self._findings = WeakKeyDictionary[Blob, Findings]()
        self.repaired_chunks = 0
        """Chunks that were written anew."""
        self.checked_bytes = 0
        """Bytes on the disk that were read to check them."""

    def findings(self, blob: Blob) -> Findings:
        """What checks have found of a blob that is open; changes as they go on."""
        return self._findings.setdefault(blob, Findings())

    async def refetch(self, blob: Blob) -> int:
        """Refetch all chunks of a blob and write those that differ from what is here; how many did.

        Raises StoreError and OSError.
        """
        changed = 0
        with held(blob):
            try:
                for chunk in range(len(blob.states)):
                    changed += await self._refetch_chunk(blob, chunk, damaged=False)
            finally:
                await self._record(blob, changed)
        return changed

    async def _refetch_chunk(self, blob: Blob, chunk: int, *, damaged: bool) -> bool:
        """Refetch a chunk, and write it if it is *damaged* or was another when it came; whether it was written.

        Raises StoreError and OSError.
        """
        descriptor = os.memfd_create("trimsfs-repair")
        try:
            record = await self._fetcher.refetch(blob, chunk, descriptor)
            if not damaged and record.crc == blob.crc(chunk):
                return False
            if record.crc != blob.crc(chunk):
                await self._disk.damage.set_digest(blob, None)
            start, _ = blob.span_of(chunk)
            await self._threads.run(_copy, descriptor, blob.fileno(), start, record.length)
        finally:
            os.close(descriptor)
        self.repaired_chunks += 1
        self._disk.damage.repaired(blob, record)
        return True

    async def _record(self, blob: Blob, wrong: int) -> None:
        """So many chunks, which programs may have copied, were wrong: *repaired* is told, even if the check was
        cancelled."""
        self.findings(blob).wrong_chunks += wrong
        if wrong:
            with trio.move_on_after(TELL_S, shield=True):
                try:
                    await self._repaired(blob.generation)
                except TrimsError as error:
                    log.error("%s", error)
                except Exception:  # a defect there must not end the server
                    log.exception("%s: what has a copy of its wrong bytes was not told", blob.generation.key)

    async def check(self, blob: Blob, *, in_memory: bool = False, rate: int | None = None) -> bool:
        """Read what is on the disk of a blob that the caller keeps, and repair chunks that fail their checksum.

        *in_memory* checks what the page cache holds as well. With *rate*, in bytes a second, the blob is not kept
        between chunks: False if it has left the disk tier before the end. Raises CacheUnusableError.
        """
        damaged = 0
        try:
            with self._direct(blob) as descriptor:
                for chunk in range(len(blob.states)):
                    if blob.states[chunk] == ChunkState.MISSING:
                        continue
                    began = trio.current_time()
                    damaged += await self._check_chunk(blob, descriptor, chunk, in_memory=in_memory)
                    length = blob.length_of(chunk)
                    self.checked_bytes += length
                    if rate is not None:
                        with _let_go(blob):
                            await trio.sleep(max(0.0, length / rate - (trio.current_time() - began)))
                        if not blob.attached:
                            return False
        finally:
            await self._record(blob, damaged)
        return True

    async def _check_chunk(self, blob: Blob, descriptor: int, chunk: int, *, in_memory: bool) -> bool:
        """Whether a chunk was wrong."""
        crc = await self._checksum(blob, descriptor, chunk)
        if crc is not None and in_memory:
            seen = await self._checksum(blob, blob.fileno(), chunk)
            crc = crc if seen == crc else None
        if blob.states[chunk] == ChunkState.MISSING:
            return False  # a reader has found the damage first
        if crc == blob.crc(chunk) and chunk not in blob.health.lost:
            if blob.states[chunk] == ChunkState.UNVERIFIED:
                await self._disk.damage.check_chunk(blob, chunk, crc)
            return False
        await self._repair_chunk(blob, chunk)
        return True

    async def _checksum(self, blob: Blob, descriptor: int, chunk: int) -> int | None:
        """The checksum of a chunk; None when it cannot be read."""
        try:
            return await self._retrying.call_locally(
                blob.generation.key,
                lambda: self._copier.checksum(descriptor, *blob.span_of(chunk)),
            )
        except OSError as error:
            log.error("%s: cannot read chunk %d: %s", blob.generation.key, chunk, error)
            return None

    @contextmanager
    def _direct(self, blob: Blob) -> Iterator[int]:
        """A descriptor that reads a blob from the disk and not from the page cache, where the file system can."""
        try:
            descriptor = os.open(self._disk.files.path(blob.token), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            try:
                descriptor = os.dup(blob.fileno())
            except OSError as error:
                raise CacheUnusableError(f"{blob.generation.key}: cannot be checked now: {error}") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    async def _repair_chunk(self, blob: Blob, chunk: int) -> None:
        """A chunk has other bytes than it came with: refetch it, or drop it, or put its blob in quarantine."""
        key = blob.generation.key
        log.error("%s: chunk %d is damaged in the cache: refetching", key, chunk)
        try:
            await self._refetch_chunk(blob, chunk, damaged=True)
        except (StoreError, OSError) as error:
            if blob.users == 1 or blob.states[chunk] == ChunkState.UNVERIFIED:
                if blob.users == 1:
                    self._unregister(blob)
                await self._disk.damage.check_chunk(blob, chunk, None)
                self.findings(blob).dropped = str(error)
            else:
                self._quarantine.add(blob, BlobDamagedError(f"{key}: chunk {chunk} is damaged in the cache: {error}"))


@contextmanager
def held(blob: Blob) -> Iterator[None]:
    """Keep a blob for the length of the block: it is not evicted. It does not count as used by anybody."""
    blob.users += 1
    try:
        yield
    finally:
        blob.users -= 1


@contextmanager
def _let_go(blob: Blob) -> Iterator[None]:
    """The opposite of `held`: for the length of the block, the blob may be evicted."""
    blob.users -= 1
    try:
        yield
    finally:
        blob.users += 1


def _copy(source: int, target: int, start: int, length: int) -> None:
    """Write the first bytes of a file into another one, from *start* on."""
    done = 0
    while done < length:
        done += os.pwrite(target, os.pread(source, length - done, done), start + done)
