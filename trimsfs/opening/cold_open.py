"""Cold opens: whether an open of a file that is not all here waits until it is, or is served as its bytes come."""

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
"""Makes a block that a signal to the opening thread ends with InterruptedError."""

PATIENCE_S, SHORT_PATIENCE_S = 3.0, 0.5
"""How long an open waits at most for a file that is expected to be read whole, and for any other: a reader of a header
pays for what readers of whole files gain."""
GUESSED_RATE = 512 << 20
"""Bytes a second, while nothing is known of the store."""
TRIAL_S = 0.5
"""How long the fetch of one file is watched before its rate is believed."""
WATCH_INTERVAL_S = 0.05
ROOM_INTERVAL_S = 0.05
"""How often room is looked for on a disk that is full of open files."""
MOST_WAITING = 512
"""Opens that wait at once; the server answers no more than twice as many requests at a time."""
MOST_ATTEMPTS = 3
"""How often an open waits for a blob that loses bytes meanwhile."""


class ColdOpener:
    """Waits for blobs that are not registered for passthrough.

    A program that reads all of a file has it sooner when its open waits until the file is here and then maps the local
    file, of which there is one copy in memory then; one that reads only a header has it sooner when bytes are passed on
    as they come. ``auto`` waits if the fetch should take no longer than SHORT_PATIENCE_S, or PATIENCE_S for a file that
    is fetched ahead or that another waits for; by the recent rate, and then by its own.

    *compared* means that no whole blob may be opened before it has been compared with the store's digest.
    *fetching* is called with each blob that an open is about to wait for.
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

    async def wait(self, blob: Blob, interruptible: Interruptible) -> bool:
        """Wait for a blob that the caller uses, if that is wise; whether its opens can be passed through now.

        Raises InterruptedError for a signal, ObjectChangedError when the store no longer has the generation,
        StoreError when nothing of the file is here and the store cannot give it, and why the blob is in quarantine.
        """
        if self._mode == "stream" or not blob.attached or (self._mode == "auto" and not self._wise(blob)):
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
                        break  # else its file has lost bytes
        except ObjectChangedError:
            raise
        except CacheFullError:
            return False
        except StoreError:
            if self._compared or blob.present_bytes == 0:
                raise
            return False  # reads of what is here succeed
        if not registered and self._compared and not blob.health.compared:
            blob.health.check()
            raise not_compared(blob)
        return registered

    async def fetch(self, blob: Blob, interruptible: Interruptible) -> bool:
        """Wait for a blob however long it takes; whether its opens can be passed through now.

        Raises as `wait`, and CacheFullError when there is no room for PATIENCE_S.
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
                    await trio.sleep(ROOM_INTERVAL_S)  # until others close what they have open
        raise AssertionError("unreachable: an interrupted block raises")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _wise(self, blob: Blob) -> bool:
        """Whether a blob is likely to be here soon."""
        missing = blob.missing_bytes
        missing_s = self._fetcher.seconds_for(missing)
        if missing_s is None:
            missing_s = missing / GUESSED_RATE
        return missing_s <= self._patience_s(blob)

    def _patience_s(self, blob: Blob) -> float:
        return PATIENCE_S if self._fetcher.expected(blob) else SHORT_PATIENCE_S

    async def _fetch(self, blob: Blob) -> bool:
        """Fetch all of a blob; False when it turns out to take too long, and goes on by itself."""
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
            # At the rate so far, when would the rest be here?
            elapsed, come = trio.current_time() - began, blob.verified_bytes - already
            left = blob.generation.size - blob.verified_bytes
            if come == 0 or elapsed + left * elapsed / come > patience_s + TRIAL_S:
                return False
            wait_s = WATCH_INTERVAL_S
        return True


def not_compared(blob: Blob) -> BlobDamagedError:
    """The error of a blob that nobody may read before it has been compared."""
    return BlobDamagedError(f"{blob.generation.key}: could not be compared with the store's digest: see the log")
