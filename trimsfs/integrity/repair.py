"""Mending: bytes of local copies that are wrong are fetched again, and written over the wrong ones."""

import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from trimsfs.errors import BlobDamagedError, CacheUnusableError, StoreError, TrimsError
from trimsfs.fetch.copier import Transfer
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.ranges import chunk_length, chunk_span
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.tiers.threads import Threads
from trimsfs.types import Generation

log = logging.getLogger(__name__)


TELL_S = 30.0
"""How long those may take who are told of bytes that were wrong."""


class Repair:
    """Finds and mends what is wrong with the blobs of a disk tier.

    *quarantine* hears of blobs in use that are wrong and cannot be repaired, *unregister* takes a blob that nobody uses
    from those the kernel reads, *repaired* hears of files whose bytes were wrong.
    """

    def __init__(
        self,
        disk: DiskTier,
        fetcher: Fetcher,
        transfer: Transfer,
        retrying: Retrying,
        *,
        quarantine: Callable[[Blob, TrimsError], None],
        unregister: Callable[[Blob], None],
        repaired: Callable[[Generation], Awaitable[object]],
    ) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._transfer = transfer
        self._retrying = retrying
        self._quarantine = quarantine
        self._unregister = unregister
        self._repaired = repaired
        self._threads = Threads(1)
        self.wrong: Counter[str] = Counter()
        """Chunks that were found to be wrong, by the tokens of their blobs."""
        self.dropped: dict[str, str] = {}
        """Why chunks that are wrong are missing now instead, by the tokens of their blobs."""
        self.repaired_chunks = 0
        """Chunks that were written anew."""
        self.checked_bytes = 0
        """Bytes on the disk that were read to check them."""

    async def refetch(self, blob: Blob) -> int:
        """Compare a blob with what the store has, byte by byte, and write what differs; the chunks that did.

        Raises StoreError and OSError.
        """
        changed = 0
        with held(blob):
            try:
                for chunk in range(len(blob.states)):
                    changed += await self._mend(blob, chunk, damaged=False)
            finally:
                await self._tell(blob, changed)
        return changed

    async def _mend(self, blob: Blob, chunk: int, *, damaged: bool) -> bool:
        """Fetch a chunk again, and write it if it is *damaged* or was another when it came; whether it was written.

        Raises StoreError and OSError.
        """
        descriptor = os.memfd_create("trimsfs-mend")
        try:
            record = await self._fetcher.fetch_again(blob, chunk, descriptor)
            if not damaged and record.crc == blob.crc(chunk):
                return False
            if record.crc != blob.crc(chunk):
                await self._disk.damage.set_digest(blob, None)
            start, _ = chunk_span(chunk, blob.generation.size)
            await self._threads.run(_copy, descriptor, blob.fileno(), start, record.length)
        finally:
            os.close(descriptor)
        self.repaired_chunks += 1
        self._disk.damage.repaired(blob, record)
        return True

    async def _tell(self, blob: Blob, wrong: int) -> None:
        """So many chunks, which somebody may have copied, were wrong: tell that, even if it was for one who left."""
        self.wrong[blob.token] += wrong
        if wrong:
            with trio.move_on_after(TELL_S, shield=True):
                try:
                    await self._repaired(blob.generation)
                except TrimsError as error:
                    log.error("%s", error)
                except Exception:  # a defect of who is told: it ends no server
                    log.exception("%s", blob.generation.key)

    async def check(self, blob: Blob, *, in_memory: bool = False, rate: int | None = None) -> bool:
        """Read what is on the disk of a blob that the caller keeps, *in_memory* what the kernel has of it as well, and
        mend what has not its checksum. With *rate*, so many bytes a second, and not keeping the blob between chunks:
        False if it has left the disk tier before its end."""
        damaged = 0
        try:
            with self._direct(blob) as descriptor:
                for chunk in range(len(blob.states)):
                    if blob.states[chunk] == ChunkState.MISSING:
                        continue
                    began = trio.current_time()
                    damaged += await self._check_chunk(blob, descriptor, chunk, in_memory=in_memory)
                    length = chunk_length(chunk, blob.generation.size)
                    self.checked_bytes += length
                    if rate is not None:
                        with _let_go(blob):
                            await trio.sleep(max(0.0, length / rate - (trio.current_time() - began)))
                        if not blob.attached:
                            return False
        finally:
            await self._tell(blob, damaged)
        return True

    async def _check_chunk(self, blob: Blob, descriptor: int, chunk: int, *, in_memory: bool) -> bool:
        """Whether a chunk was wrong."""
        crc = await self._checksum(blob, descriptor, chunk)
        if crc is not None and in_memory:
            seen = await self._checksum(blob, blob.fileno(), chunk)
            crc = crc if seen == crc else None
        if blob.states[chunk] == ChunkState.MISSING:
            return False  # a reader has found out
        if crc == blob.crc(chunk) and chunk not in blob.health.lost:
            if blob.states[chunk] == ChunkState.UNVERIFIED:
                await self._disk.damage.checked(blob, chunk, crc)
            return False
        await self._mend_damaged(blob, chunk)
        return True

    async def _checksum(self, blob: Blob, descriptor: int, chunk: int) -> int | None:
        try:
            return await self._retrying.call(
                blob.generation.key,
                lambda: self._transfer.checksum(descriptor, *chunk_span(chunk, blob.generation.size)),
            )
        except OSError as error:
            log.error("%s: cannot read chunk %d: %s", blob.generation.key, chunk, error)
            return None

    @contextmanager
    def _direct(self, blob: Blob) -> Iterator[int]:
        """A descriptor that reads a blob from the disk, whatever the kernel has of it in memory, where that can be."""
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

    async def _mend_damaged(self, blob: Blob, chunk: int) -> None:
        """A chunk has other bytes than it came with: fetch it again, or see that nobody gets it."""
        key = blob.generation.key
        log.error("%s: chunk %d is damaged in the cache: fetching it again", key, chunk)
        try:
            await self._mend(blob, chunk, damaged=True)
        except (StoreError, OSError) as error:
            if blob.users == 1 or blob.states[chunk] == ChunkState.UNVERIFIED:
                if blob.users == 1:
                    self._unregister(blob)
                await self._disk.damage.checked(blob, chunk, None)
                self.dropped[blob.token] = str(error)
            else:
                self._quarantine(blob, BlobDamagedError(f"{key}: chunk {chunk} is damaged in the cache: {error}"))


@contextmanager
def held(blob: Blob) -> Iterator[None]:
    """Keep a blob, without counting it as used."""
    blob.users += 1
    try:
        yield
    finally:
        blob.users -= 1


@contextmanager
def _let_go(blob: Blob) -> Iterator[None]:
    """The opposite, for the length of the block: it may be evicted."""
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
