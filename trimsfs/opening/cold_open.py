"""Cold opens: an open of a file that is not resident waits for the whole file, or streams it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import trio

from trimsfs.errors import BlobDamagedError, CacheFullError, ObjectChangedError, StoreError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob

ColdOpen = Literal["auto", "wait", "stream"]
Interruptible = Callable[[], AbstractContextManager[object]]
"""Makes a block in which a signal to the opening thread raises InterruptedError."""

PATIENCE_S, SHORT_PATIENCE_S = 3.0, 0.5
"""Longest wait of an open: for a file that others fetch whole, and for any other. Readers of a header wait in vain."""
GUESSED_RATE = 512 << 20
"""Bytes a second to assume before the store's speed is measured."""
TRIAL_S = 0.5
"""How long the fetch of a file runs before its own rate counts."""
WATCH_INTERVAL_S = 0.05
ROOM_INTERVAL_S = 0.05
"""How often an open tries again while open files fill the cache."""
MOST_WAITING = 512
"""Most opens that wait at once: half of the requests that the server answers at once."""
MOST_ATTEMPTS = 3
"""Most waits of an open for a blob that loses bytes meanwhile."""


class ColdOpener:
    """Lets opens wait for blobs that are not registered for passthrough.

    A program that reads a whole file gets it sooner if its open waits: it then maps the local file, with one copy in
    memory. A program that reads only a header gets it sooner from a stream. ``auto`` waits if the fetch should take at
    most SHORT_PATIENCE_S, or PATIENCE_S for a file that is prefetched or that another caller waits for. It estimates by
    the store's recent rate, then by the rate of this fetch.

    *compared*: no whole blob may be opened before it is compared with the store's digest. *fetching* hears of each
    blob that an open is about to wait for.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        passthrough: Passthrough,
        *,
        mode: ColdOpen,
        compared: bool,
        fetching: Callable[[Blob], None],
    ) -> None:
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._mode = mode
        self._compared = compared
        self._waiting = 0
        self._fetching = fetching

    async def wait(self, blob: Blob, interruptible: Interruptible, *, shared: bool) -> bool:
        """Wait for a blob that the caller holds, if the wait is short; whether its opens can be passed through now.

        If *shared*, programs have the file open in cached mode, so this open will be, too: ``auto`` does not wait.
        Raises InterruptedError on a signal, ObjectChangedError if the store has another generation, and the reason if
        the blob is in quarantine. Raises StoreError if the fetch fails and no cached byte may be read.
        """
        if self._mode == "stream" or not blob.attached:
            return False
        if self._mode == "auto" and (shared or not self._wise(blob)):
            return False
        if self._waiting >= MOST_WAITING and not self._compared:
            return False
        try:
            with interruptible(), self._counted():
                for _ in range(MOST_ATTEMPTS):
                    if not await self._fetch(blob):
                        return False
                    registered = await self._passthrough.register(blob)
                    if blob.complete:
                        break  # else its file lost bytes meanwhile
        except ObjectChangedError:
            raise
        except CacheFullError:
            return False
        except StoreError:
            if self._compared or blob.present_bytes == 0:
                raise
            return False  # reads of cached bytes succeed
        if not registered and self._compared and not blob.health.compared:
            blob.health.check()
            raise not_compared(blob)
        return registered

    async def fetch(self, blob: Blob, interruptible: Interruptible) -> bool:
        """Wait for a blob without a time limit; whether its opens can be passed through now.

        Raises as `wait`, and CacheFullError if the cache has no room for PATIENCE_S.
        """
        full_since: float | None = None
        with interruptible(), self._counted():
            while True:
                try:
                    await self._fetcher.fetch_all(blob)
                    return await self._passthrough.register(blob)
                except CacheFullError:
                    full_since = full_since or trio.current_time()
                    if not blob.attached or trio.current_time() - full_since > PATIENCE_S:
                        raise
                    await trio.sleep(ROOM_INTERVAL_S)  # until programs close other files
        raise AssertionError("unreachable: an interrupted block raises")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _wise(self, blob: Blob) -> bool:
        """Whether a fetch of the missing bytes should be short enough."""
        missing = blob.missing_bytes
        missing_s = self._fetcher.seconds_for(blob, missing)
        if missing_s is None:
            missing_s = missing / GUESSED_RATE
        return missing_s <= self._patience_s(blob)

    def _patience_s(self, blob: Blob) -> float:
        return PATIENCE_S if self._fetcher.expected(blob) else SHORT_PATIENCE_S

    async def _fetch(self, blob: Blob) -> bool:
        """Fetch all of a blob; False if it takes too long: the fetch then goes on without the open."""
        patience_s = self._patience_s(blob)
        self._fetching(blob)
        if self._mode == "wait":
            await self._fetcher.fetch_all(blob)
        began, already = trio.current_time(), blob.verified_bytes
        wait_s = TRIAL_S
        while not blob.complete:
            with trio.move_on_after(wait_s):
                await self._fetcher.fetch_all(blob)
                break
            # Estimate the end of the fetch by its rate so far.
            elapsed, come = trio.current_time() - began, blob.verified_bytes - already
            left = blob.generation.size - blob.verified_bytes
            patience_s = max(patience_s, self._patience_s(blob))  # others may wait for it by now
            if come == 0 or elapsed + left * elapsed / come > patience_s + TRIAL_S:
                return False
            wait_s = WATCH_INTERVAL_S
        return True


def not_compared(blob: Blob) -> BlobDamagedError:
    """The error of an open of a blob that must be compared first, and could not be."""
    return BlobDamagedError(f"{blob.generation.key}: could not be compared with the store's digest: see the log")
