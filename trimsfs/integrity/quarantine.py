"""Quarantine: local copies that are damaged and could not be repaired. Reads of them fail."""

import logging
import math
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary, WeakSet

import trio

from trimsfs.errors import CacheError, CacheUnusableError, InUseError, StoreError, TrimsError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import KnownBlobs, Retention

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
RETRY_INTERVAL_S = 300.0
"""Seconds between repairs of a copy that is in use."""
REFUTED_S = 60.0
"""How long a copy stays of which the store gave the same wrong bytes twice: its opens fail without another fetch."""


class Quarantine:
    """The blobs of a disk tier that are in quarantine. *changed* hears of each that is added or released."""

    def __init__(self, blobs: KnownBlobs, retention: Retention, *, changed: Callable[[Blob], None]) -> None:
        self._blobs = blobs
        self._retention = retention
        self._changed = changed
        self._since: dict[Blob, float] = {}
        self._added = trio.Event()
        self._suspected = WeakKeyDictionary[Blob, float]()
        self._refuted = WeakSet[Blob]()

    @property
    def count(self) -> int:
        """How many blobs are in quarantine."""
        return len(self._since)

    def add(self, blob: Blob, reason: TrimsError, *, refuted: bool = False) -> None:
        """Put a blob in quarantine: for REFUTED_S if *refuted*, as the store would give the same bytes again."""
        if refuted:
            self._refuted.add(blob)
        else:
            self._refuted.discard(blob)
        log.error("%s: in quarantine, reads fail: %s", blob.generation.key, reason)
        blob.health.quarantine = reason
        self._since[blob] = trio.current_time()
        self._added.set()
        self._changed(blob)

    def release(self, blob: Blob) -> None:
        """Take a blob out of quarantine, if it is in."""
        self._refuted.discard(blob)
        blob.health.quarantine = None
        self._since.pop(blob, None)
        self._changed(blob)

    def suspect(self, blob: Blob, reason: TrimsError) -> None:
        """Put a blob whose file may be damaged in quarantine, to be checked soon."""
        before = self._suspected.get(blob, -math.inf)
        self.add(blob, reason)
        now = trio.current_time()
        if now - before > RETRY_INTERVAL_S:  # else it was damaged again soon, and waits that long
            self._suspected[blob] = now
            self._since[blob] = -math.inf

    async def run(self, repair: Callable[[Blob], Awaitable[None]]) -> None:
        """Evict quarantined blobs that nobody uses; *repair* those in use, every RETRY_INTERVAL_S.

        The next open fetches an evicted blob again.
        """
        while True:
            while not self._since:
                await self._added.wait()
                self._added = trio.Event()
            await trio.sleep(LOOK_INTERVAL_S)
            for blob, since in list(self._since.items()):
                if self._blobs.known(blob.token) is not blob:
                    if not blob.attached:
                        self._since.pop(blob, None)
                elif isinstance(blob.health.quarantine, StoreError | CacheUnusableError):  # the next open tries again
                    self.release(blob)
                elif blob.users == 0 and not blob.pinned:
                    if blob in self._refuted and trio.current_time() - since <= REFUTED_S:
                        continue
                    try:
                        await self._retention.evict(blob.generation)
                    except (InUseError, CacheError) as error:
                        log.warning("%s: in quarantine and not evicted: %s", blob.generation.key, error)
                elif trio.current_time() - since > RETRY_INTERVAL_S:
                    self._since[blob] = trio.current_time()
                    await repair(blob)
