"""Actions: warm, pin, unpin, evict or verify one file."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import TypeVar

import trio

from trimsfs.control.extra import Extra
from trimsfs.control.progress import Progress
from trimsfs.errors import (
    BlobDamagedError,
    CacheError,
    CacheFullError,
    CacheUnusableError,
    StoreAccessError,
    StoreUnavailableError,
    TransientStoreError,
    TrimsError,
)
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.fetch.flights import Urgency
from trimsfs.integrity.integrity import Integrity
from trimsfs.integrity.signature_policy import SignaturePolicy
from trimsfs.opening.passthrough import Passthrough
from trimsfs.origins import ByPath, by_path
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse, Retention
from trimsfs.tiers.host.memory_tier import HostTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

T = TypeVar("T")

RELEASE_CHECKS, RELEASE_INTERVAL_S = 50, 0.01
"""How often, and how far apart, an eviction checks for a late close, or for the server to end its own use."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0
"""How long the server waits before it tries again to restore pinned files: at first, and at most."""
PASSING = (CacheError, StoreAccessError, StoreUnavailableError, TransientStoreError)
"""The errors after which a later attempt to restore a pinned file may succeed."""


def _pauses() -> Iterator[float]:
    """The pauses between attempts, in seconds."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class Actions:
    """Brings files into tiers, checks and removes them. Methods for one file raise TrimsError.

    *forget_pages* drops the pages that the kernel keeps of a file from reads in cached mode. *cache_size* is the
    option.
    """

    def __init__(
        self,
        blobs: BlobUse,
        retention: Retention,
        host: HostTier,
        fetcher: Fetcher,
        passthrough: Passthrough,
        extras: Sequence[Extra],
        integrity: Integrity,
        signature_policy: SignaturePolicy | None,
        breaker: CircuitBreaker | ByPath[CircuitBreaker],
        forget_pages: Callable[[Generation], Awaitable[None]],
        *,
        cache_size: int | None,
    ) -> None:
        self._blobs = blobs
        self._retention = retention
        self._host = host
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._extras = extras
        self._integrity = integrity
        self._signature_policy = signature_policy
        self._breakers = by_path(breaker)
        self._forget_pages = forget_pages
        self._cache_size = cache_size
        self._pins = trio.Lock()

    async def restore_pins(self) -> None:
        """Load all pinned files into memory again, and refetch what is missing. What fails for now is tried again."""
        for pause_s in _pauses():
            try:
                residencies = await self._retention.all()
                break
            except TrimsError as error:
                log.error("cannot restore pinned files: %s", error)
            await trio.sleep(pause_s)
        left = dict[CircuitBreaker, list[Generation]]()
        # Whole files first: these wait for no store.
        whole_first = sorted(residencies, key=lambda here: here.disk_bytes < here.generation.size)
        for generation in [here.generation for here in whole_first if here.pinned]:
            if not await self._pin_again(generation):
                # The others may not need the store.
                left.setdefault(self._breakers.of(generation.key), []).append(generation)
        async with trio.open_nursery() as nursery:
            for breaker, generations in left.items():
                nursery.start_soon(self._pin_all_again, breaker, generations)

    async def _pin_all_again(self, breaker: CircuitBreaker, generations: Sequence[Generation]) -> None:
        """Load pinned files of a store until each is there, or cannot be."""
        for pause_s in _pauses():
            await trio.sleep(pause_s)
            await breaker.answers()
            generations = [each for each in generations if not await self._pin_again(each)]
            if not generations:
                return

    async def _pin_again(self, generation: Generation) -> bool:
        """Load a file if it is still pinned; whether another attempt would be in vain."""
        try:
            if (await self._retention.of(generation)).pinned:
                await self.pin(generation, Progress(generation.key), again=True)
        except TrimsError as error:
            log.warning("%s: pinned, but not wholly cached: %s", generation.key, error)
            return not isinstance(error, PASSING)
        return True

    async def warm_disk(self, generation: Generation, progress: Progress) -> None:
        """Fetch a file to disk."""
        async with self._arriving(generation, progress) as blob:
            await self._fetch(blob)

    async def warm_host(self, generation: Generation, progress: Progress) -> None:
        """Fetch a file to disk and load it into memory."""
        async with self._arriving(generation, progress) as blob:
            await self._fetch(blob)
            await self._in_memory(partial(self._host.load, again=True), blob)
            await self._passthrough.register(blob)

    async def _fetch(self, blob: Blob) -> None:
        await self._admit(blob)
        limit, size = self._cache_size, blob.generation.size
        if limit is not None and size > limit and not blob.complete:
            raise CacheFullError(
                f"{blob.generation.key}: no room in the cache: its {size >> 20} MiB are more than --cache-size, "
                f"{limit >> 20} MiB: raise that"
            )
        await self._fetcher.fetch_all(blob, Urgency.COMMAND)
        blob.health.check()

    async def _admit(self, blob: Blob) -> None:
        """Check a blob's signature. Raises SignatureError if no program may open it."""
        if self._signature_policy is not None:
            await self._signature_policy.admit(blob, nullcontext)

    async def _in_memory(self, function: Callable[[Blob], Awaitable[T]], blob: Blob) -> T | None:
        if not blob.attached:
            return None  # an empty file
        try:
            return await function(blob)
        except OSError as error:
            raise CacheUnusableError(f"{blob.generation.key}: cannot be read from the cache: {error}") from error

    async def pin(self, generation: Generation, progress: Progress, *, again: bool = False) -> None:
        """Pin a file; on disk only, if it cannot be locked in memory. *again*: only if it is still pinned."""
        async with self._arriving(generation, progress) as blob:
            await self._fetch(blob)
            await self._in_memory(partial(self._host.load, again=True), blob)
            async with self._pinning():
                if again and not blob.pinned:
                    return
                hindrance = await self._in_memory(self._host.pin, blob)
                try:
                    await self._retention.pin(blob, True)
                except BaseException:
                    if not blob.pinned:
                        await self._host.unpin(blob)
                    raise
            if hindrance is not None:
                progress.not_locked(hindrance)
            await self._passthrough.register(blob)

    @asynccontextmanager
    async def _pinning(self) -> AsyncIterator[None]:
        """Run one pin or unpin at a time, uncancelled, so that exactly the pinned files are locked in memory."""
        async with self._pins:
            with trio.CancelScope(shield=True):
                yield

    @asynccontextmanager
    async def _arriving(self, generation: Generation, progress: Progress) -> AsyncIterator[Blob]:
        """The blob of a generation, held and counted as progress for the length of the block."""
        async with self._blobs.using(generation) as blob:
            progress.arriving.add(blob)
            progress.interrupted.pop(generation.key, None)
            try:
                yield blob
            except StoreUnavailableError:
                progress.interrupted[generation.key] = blob.verified_bytes
                raise
            finally:
                progress.arriving.discard(blob)

    async def unpin(self, generation: Generation, progress: Progress) -> None:
        """Allow eviction of a pinned file."""
        async with self._blobs.using(generation) as blob, self._pinning():
            await self._retention.pin(blob, False)
            await self._host.unpin(blob)

    async def evict(self, generation: Generation, progress: Progress) -> None:
        """Evict a file, its pages in memory, and what extras have of it. Raises InUseError while it is in use."""
        for _ in range(RELEASE_CHECKS):
            here = await self._retention.of(generation)
            if here.users == 0 or here.pinned:
                break
            await trio.sleep(RELEASE_INTERVAL_S)
        if here.disk_bytes == 0:
            progress.absent(generation.size)
        for extra in self._extras:
            extra.check_idle(generation)
        await self._retention.evict(generation)
        for extra in self._extras:
            await extra.evicted(generation)
        await self._forget_pages(generation)  # last: it waits for reads in flight if a program opens the file again

    @asynccontextmanager
    async def admitted(self, generation: Generation, progress: Progress) -> AsyncIterator[Blob]:
        """A block with the blob of a file that programs may open. Raises SignatureError for any other."""
        async with self._arriving(generation, progress) as blob:
            await self._admit(blob)
            yield blob

    async def verify(self, generation: Generation, progress: Progress) -> None:
        """Check a file on disk and in memory, and compare it with the store.

        Raises BlobDamagedError if it was damaged, even if it is repaired now.
        """
        if (await self._retention.of(generation)).disk_bytes == 0:
            progress.absent(generation.size)
        damaged = await self._integrity.verify(generation)
        if damaged:
            raise BlobDamagedError(f"{generation.key}: local copy was damaged, chunks refetched: {damaged}")
