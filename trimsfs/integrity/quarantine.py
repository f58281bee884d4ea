"""Local copies that are wrong and could not be mended: nobody gets any more of them."""

import logging
import math
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

import trio

from trimsfs.errors import CacheError, CacheUnusableError, InUseError, StoreError, TrimsError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 300.0
"""After which it is tried again to mend a copy that is in use."""


class Quarantine:
    """The blobs of a disk tier that are in doubt; *try_again* tries to mend one that is in use, and ends the doubt.

    *changed* hears of each blob that is in doubt, or no longer.
    """

    def __init__(
        self, disk: DiskTier, try_again: Callable[[Blob], Awaitable[None]], *, changed: Callable[[Blob], None]
    ) -> None:
        self._disk = disk
        self._try_again = try_again
        self._changed = changed
        self._since: dict[Blob, float] = {}
        self._suspected = WeakKeyDictionary[Blob, float]()

    @property
    def count(self) -> int:
        """How many blobs are in doubt."""
        return len(self._since)

    def add(self, blob: Blob, error: TrimsError) -> None:
        """A blob is in doubt, for this reason."""
        log.error("%s: nobody gets any more of it: %s", blob.generation.key, error)
        blob.health.quarantine = error
        self._since[blob] = trio.current_time()
        self._changed(blob)

    def release(self, blob: Blob) -> None:
        """A blob is in doubt no longer."""
        blob.health.quarantine = None
        self._since.pop(blob, None)
        self._changed(blob)

    def suspect(self, blob: Blob, error: TrimsError) -> None:
        """The file of a blob may have been damaged: nobody gets any more of it until it has been checked, soon."""
        before = self._suspected.get(blob, -math.inf)
        self.add(blob, error)
        now = trio.current_time()
        if now - before > RETRY_INTERVAL_S:  # else it is damaged again and again
            self._suspected[blob] = now
            self._since[blob] = -math.inf

    async def run(self) -> None:
        """Remove what is in doubt as soon as nobody uses it; try to mend it while somebody does."""
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            for blob, since in list(self._since.items()):
                if self._disk.known(blob.token) is not blob:
                    if not blob.attached:
                        self._since.pop(blob, None)
                elif isinstance(blob.health.quarantine, StoreError | CacheUnusableError):  # the next open tries again
                    self.release(blob)
                elif blob.users == 0 and not blob.pinned:
                    try:
                        await self._disk.evict(blob.generation)
                    except (InUseError, CacheError) as error:
                        log.warning("%s: not removed: %s", blob.generation.key, error)
                elif trio.current_time() - since > RETRY_INTERVAL_S:
                    self._since[blob] = trio.current_time()
                    await self._try_again(blob)
