"""Opening a file that is not here: wait until it is, or serve it as it comes."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, TypeVar

import trio

from trimsfs.concurrency.background import Background
from trimsfs.errors import BlobDamagedError, CacheFullError, ObjectChangedError, StoreError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier

log = logging.getLogger(__name__)

T = TypeVar("T")

ColdOpen = Literal["auto", "wait", "stream"]
Interruptible = Callable[[], AbstractContextManager[object]]
"""Makes a block that a signal to the opening thread ends with InterruptedError."""

PATIENCE_S = 3.0
"""How long a reader of a header is made to wait, at most, for what readers of whole files gain."""
TRIAL_S = 0.5
"""How long the fetch of one file is watched before its rate is believed."""
WATCH_INTERVAL_S = 0.05
ROOM_INTERVAL_S = 0.05
"""How often room is looked for on a disk that is full of what is open."""
MOST_WAITING = 512
"""Opens that wait at once; the server answers no more than twice as many requests at a time."""
MOST_ATTEMPTS = 3
"""How often an open waits, or a read begins anew, as bytes were lost before all had been compared."""
EXPECTED_WITHIN_S = 0.4
"""How long a file that an open has waited for is kept for the kernel to come back for it."""


class ColdOpener:
    """Decides for opens of files that are not resident.

    A program that reads all of a file has it sooner when its open waits until the file is here and then maps the local
    file; one that reads only a header has it sooner when bytes are passed on as they come. ``auto`` waits
    when the whole fetch should take no longer than PATIENCE_S, by the rate of late and then by its own.

    *compared* tells that nothing that is all here may be opened before it has been compared with the store's digest.
    *fetching* hears of each blob that an open is about to wait for.
    """

    def __init__(
        self,
        disk: DiskTier,
        fetcher: Fetcher,
        passthrough: Passthrough,
        *,
        mode: ColdOpen,
        compared: bool,
        fetching: Callable[[Blob], None],
    ) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._mode = mode
        self._compared = compared
        self._background = Background()
        self._expected: dict[tuple[str, int], trio.Event] = {}
        self._waiting = 0
        self._fetching = fetching

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is about to be opened, for as long as the server runs."""
        await self._background.run(task_status)

    async def wait(self, blob: Blob, interruptible: Interruptible, thread: int) -> bool:
        """Wait for a blob that the caller uses, if that is wise; whether it is resident now.

        If it is, it stays so for a while: the kernel looks the name up again for the thread, but only once.

        Raises InterruptedError for a signal, ObjectChangedError when the store no longer has the generation,
        StoreError when nothing of the file is here and the store cannot give it, and what speaks against its bytes.
        """
        if self._mode == "stream" or not blob.attached or self._hopeless(blob):
            return False
        if self._waiting >= MOST_WAITING and not self._compared:
            return False
        try:
            with interruptible(), self._place():
                for _ in range(MOST_ATTEMPTS):
                    if not await self._fetch(blob):
                        return False
                    resident = await self._passthrough.register(blob)
                    if blob.complete:
                        break  # else its file had been cut off
        except ObjectChangedError:
            raise
        except CacheFullError:
            return False
        except StoreError:
            if self._compared or blob.present_bytes == 0:
                raise
            return False  # reads of what is here succeed
        if resident:
            self._expect(blob, thread)
        elif self._compared and not blob.health.compared:
            blob.health.check()
            raise _not_compared(blob)
        return resident

    async def read(self, blob: Blob, read: Callable[[], Awaitable[T]]) -> T:
        """What is read of an open file; where nothing may be given uncompared, and there is room for it, only once what
        came for bytes that were lost has been compared. Raises as *read* and `wait` do."""
        for _ in range(MOST_ATTEMPTS):
            revision = blob.health.revision
            data = await read()
            if not self._compared or not blob.attached or (blob.health.compared and blob.health.revision == revision):
                return data
            if not blob.complete:
                if not blob.health.revision or self._disk.full(blob.generation):
                    return data  # there is no room for it
                try:
                    await self._fetcher.fetch_all(blob)
                except CacheFullError:
                    return data
            await self._passthrough.register(blob)
            blob.health.check()
            await trio.lowlevel.checkpoint_if_cancelled()  # who stops with the server says nothing of the file
        raise _not_compared(blob)

    async def fetch(self, blob: Blob, interruptible: Interruptible) -> bool:
        """Wait for a blob however long it takes; whether it is resident now.

        Raises as `wait`, and CacheFullError when there is no room for PATIENCE_S.
        """
        full_since: float | None = None
        with interruptible(), self._place():
            while True:
                try:
                    await self._fetcher.fetch_all(blob)
                    return await self._passthrough.register(blob)
                except CacheFullError:
                    full_since = full_since or trio.current_time()
                    if not blob.attached or trio.current_time() - full_since > PATIENCE_S:
                        raise
                    await trio.sleep(ROOM_INTERVAL_S)  # others close what they have open
        raise AssertionError("unreachable: an interrupted block raises")

    @contextmanager
    def _place(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def opened(self, blob: Blob, thread: int) -> None:
        """A blob that is here was opened by a thread."""
        expected = self._expected.get((blob.token, thread))
        if expected is not None:
            expected.set()

    def _expect(self, blob: Blob, thread: int) -> None:
        """Keep a blob until the thread has opened it."""
        key = (blob.token, thread)
        if self._background.running and key not in self._expected:
            blob.users += 1
            self._expected[key] = trio.Event()
            self._background.start(self._keep, blob, key)

    async def _keep(self, blob: Blob, key: tuple[str, int]) -> None:
        try:
            with trio.move_on_after(EXPECTED_WITHIN_S):
                await self._expected[key].wait()
        finally:
            del self._expected[key]
            self._disk.release(blob)

    def _hopeless(self, blob: Blob) -> bool:
        missing_s = self._fetcher.seconds_for(blob.missing_bytes)
        return self._mode == "auto" and missing_s is not None and missing_s > PATIENCE_S

    async def _fetch(self, blob: Blob) -> bool:
        """Fetch all of a blob; False when it turns out to take too long, and goes on by itself."""
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
            if come == 0 or elapsed + left * elapsed / come > PATIENCE_S:
                return False
            wait_s = WATCH_INTERVAL_S
        return True


def _not_compared(blob: Blob) -> BlobDamagedError:
    return BlobDamagedError(f"{blob.generation.key}: could not be compared with the store's digest: see the log")
