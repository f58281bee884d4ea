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

Compare = Callable[[Blob, float | None], Awaitable[object]]
"""Compares a blob: in idle time until an instant of trio's clock, then at low priority; for None, at low priority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When deferred comparisons start, and how many run at once in idle time."""

    idle_s: float = IDLE_S
    latest_s: float = LATEST_S
    at_once: int = len(os.sched_getaffinity(0))


class Retries:
    """When to compare a blob again that could not be compared: a store may be away for days."""

    def __init__(self) -> None:
        self._pause_s = RETRY_INTERVAL_S
        self._told = ""

    def failed(self, blob: Blob, error: TrimsError) -> float:
        """After how many seconds to try again. Logs the reason, once."""
        if str(error) != self._told:
            self._told = str(error)
            not_yet(blob, error)
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_INTERVAL_S)
        return pause_s


def not_yet(blob: Blob, error: TrimsError) -> None:
    """Log why a blob could not be compared now."""
    log.warning("%s: not compared with the store yet: %s", blob.generation.key, error)


class _Entry:
    """A blob that waits for idle time, until the instant *due* at most."""

    def __init__(self, blob: Blob, due: float) -> None:
        self.blob = blob
        self.due = due
        self.not_before = float("-inf")
        self.retries = Retries()
        self.running = False


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
    def tokens(self) -> set[str]:
        """The tokens of the blobs that wait for a comparison or are being compared."""
        return set(self._entries)

    def add(self, blob: Blob) -> None:
        """Defer the comparison of a blob."""
        entry = self._entries.get(blob.token)
        if entry is None or entry.blob is not blob:
            self._entries[blob.token] = _Entry(blob, trio.current_time() + self._pace.latest_s)
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
                self.discard(entry.blob)

    def _startable(self) -> list[tuple[_Entry, bool]]:
        """The comparisons that may start now, the oldest first, and whether each runs in idle time."""
        now = trio.current_time()
        waiting = [entry for entry in self._entries.values() if not entry.running and entry.not_before <= now]
        running = [entry for entry in self._entries.values() if entry.running]
        started: list[tuple[_Entry, bool]] = []
        if not any(entry.due <= now for entry in running):
            started += [(entry, False) for entry in waiting if entry.due <= now][:1]
        if self._quiet_s() > self._pace.idle_s:
            room = max(0, self._pace.at_once - len(running) - len(started))
            started += [(entry, True) for entry in waiting if entry.due > now][:room]
        return started

    async def _run(self, entry: _Entry, in_idle_time: bool) -> None:
        try:
            await self._compare(entry.blob, entry.due if in_idle_time else None)
        except (ObjectChangedError, ObjectNotFoundError, SignatureError):
            self.discard(entry.blob)  # the object was replaced or deleted, or the file is not signed
        except TrimsError as error:
            entry.not_before = trio.current_time() + entry.retries.failed(entry.blob, error)
        except Exception:  # a defect: it ends this comparison, not the server
            log.exception("%s: not compared with the store: internal error", entry.blob.generation.key)
            self.discard(entry.blob)
        else:
            self.discard(entry.blob)
        finally:
            entry.running = False
            self._tell()
