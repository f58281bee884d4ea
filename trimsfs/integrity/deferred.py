"""Deferred comparisons: whole copies are compared with the store's digests once the server is idle."""

import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, SignatureError, TrimsError
from trimsfs.tiers.blob import Blob

log = logging.getLogger(__name__)

IDLE_S = 5.0
"""How long the server must be idle before a comparison starts: no fetch, no waiting open, no read."""
LATEST_S = 600.0
"""How long a comparison is deferred if the server is never idle."""
LOOKS = 5
"""How often in IDLE_S the server checks whether it is idle."""
RETRY_INTERVAL_S, LONGEST_INTERVAL_S = 1.0, 5.0
"""Seconds after which a failed comparison is retried: at first, and at most."""
AT_ONCE = float("-inf")
"""When a comparison is due that waits for nothing."""

Compare = Callable[[Blob, float | None], Awaitable[object]]
"""Compares a blob: in idle time until an instant of trio's clock, then at low priority; for None, at low priority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When deferred comparisons start, and how many run at once in idle time."""

    idle_s: float = IDLE_S
    latest_s: float = LATEST_S
    at_once: int = len(os.sched_getaffinity(0))


def not_yet(blob: Blob, error: TrimsError) -> None:
    """Log why a blob could not be compared now."""
    log.warning("%s: not compared with the store yet: %s", blob.generation.key, error)


class _Entry:
    """A blob that waits for idle time, until the instant *due* at most: a store may be away for days."""

    def __init__(self, blob: Blob, due: float) -> None:
        self.blob = blob
        self.due = due
        self.running = False
        self.not_before = float("-inf")
        self._pause_s = RETRY_INTERVAL_S
        self._logged = ""

    def failed(self, error: TrimsError) -> None:
        """Try again later, and ever later unless it is due at once. Logs the reason, once."""
        if str(error) != self._logged:
            self._logged = str(error)
            not_yet(self.blob, error)
        self.not_before = trio.current_time() + self._pause_s
        if self.due != AT_ONCE:
            self._pause_s = min(2 * self._pause_s, LONGEST_INTERVAL_S)


class DeferredComparisons:
    """Starts comparisons once the server is idle. Overdue ones start anyway, one after the other.

    *quiet_s* returns for how long nobody has waited for bytes, *uncompared* whether a blob still needs a comparison.
    """

    def __init__(
        self, pace: Pace, *, quiet_s: Callable[[], float], uncompared: Callable[[Blob], bool], compare: Compare
    ) -> None:
        self._pace = pace
        self._quiet_s = quiet_s
        self._uncompared = uncompared
        self._compare = compare
        self._entries: dict[str, _Entry] = {}
        self._changed = trio.Event()

    @property
    def count(self) -> int:
        """How many blobs wait for a comparison or are being compared."""
        return len(self._entries)

    def add(self, blob: Blob, *, at_once: bool = False) -> None:
        """Compare a blob later; *at_once*, its bytes are in doubt, or a program waits for it."""
        due = AT_ONCE if at_once else trio.current_time() + self._pace.latest_s
        entry = self._entries.get(blob.token)
        if entry is None or entry.blob is not blob or due < entry.due:
            self._entries[blob.token] = _Entry(blob, due)
            self._tell()

    def discard(self, blob: Blob) -> None:
        """Forget a blob that needs no comparison, but not a newer one with the same token."""
        entry = self._entries.get(blob.token)
        if entry is not None and entry.blob is blob:
            del self._entries[blob.token]

    async def run(self) -> None:
        """Start comparisons until the server stops."""
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._changed
                self._prune()
                for entry, in_idle_time in self._startable():
                    entry.running = True
                    nursery.start_soon(self._run, entry, in_idle_time)
                if self._entries:
                    with trio.move_on_after(self._pace.idle_s / LOOKS):
                        await changed.wait()
                else:
                    await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _prune(self) -> None:
        """Forget blobs that were evicted or compared elsewhere."""
        for entry in list(self._entries.values()):
            if not entry.running and not self._uncompared(entry.blob):
                self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        """Forget an entry, but not one that has replaced it."""
        if self._entries.get(entry.blob.token) is entry:
            del self._entries[entry.blob.token]

    def _startable(self) -> list[tuple[_Entry, bool]]:
        """The comparisons that may start now, the oldest first, and whether each runs in idle time."""
        now, entries = trio.current_time(), self._entries.values()
        waiting = [entry for entry in entries if not entry.running and entry.not_before <= now]
        started: list[tuple[_Entry, bool]] = []
        for at_once in (True, False):  # what is in doubt does not wait for what is only overdue
            if not any(entry.running and entry.due <= now and (entry.due == AT_ONCE) is at_once for entry in entries):
                overdue = [entry for entry in waiting if entry.due <= now and (entry.due == AT_ONCE) is at_once]
                started += [(entry, False) for entry in overdue[:1]]
        if self._quiet_s() > self._pace.idle_s:
            room = max(0, self._pace.at_once - sum(entry.running for entry in entries) - len(started))
            started += [(entry, True) for entry in waiting if entry.due > now][:room]
        return started

    async def _run(self, entry: _Entry, in_idle_time: bool) -> None:
        try:
            await self._compare(entry.blob, entry.due if in_idle_time else None)
            self._forget(entry)
        except (ObjectChangedError, ObjectNotFoundError, SignatureError):
            self._forget(entry)  # the object was replaced or deleted, or the file is not signed
        except TrimsError as error:
            entry.failed(error)
        except Exception:  # a defect: it ends this comparison, not the server
            log.exception("%s: not compared with the store: internal error", entry.blob.generation.key)
            self._forget(entry)
        finally:
            entry.running = False
            self._tell()
