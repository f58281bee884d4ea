"""Decides when the next server may start, and when the keeper gives up, from how earlier servers have ended."""

import math
import time
from typing import Any

STABLE_S = 1.0
"""A server that ends sooner after it was ready counts as a crash."""
CRASH_LIMIT = 6
"""After so many crashes in a row the keeper gives up: readers then get an error instead of waiting on."""
IMMEDIATE_RESTARTS = 2
"""Up to so many crashes in a row, the keeper restarts without a delay."""
BACKOFF_S, BACKOFF_LIMIT_S = 0.1, 5.0


class RestartPolicy:
    """Counts servers that have ended. Times are of the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self.restarts = 0
        """How many servers have ended after their promotion."""
        self.last_end: str | None = None
        """How the last server ended that was not replaced on purpose."""
        self._last_end_at: float | None = None
        self.vacant_since: float | None = None
        """When the last server that has served ended, for whatever reason."""
        self._crashes = self._failed_standbys = 0
        self._not_before = 0.0

    def facts(self) -> dict[str, Any]:
        """The counts that operators see. ``last_end_at`` is in seconds since the epoch, by the clock as it is now."""
        ended_at = None if self._last_end_at is None else time.time() - (_elapsed() - self._last_end_at)
        return {"restarts": self.restarts, "last_end": self.last_end, "last_end_at": ended_at}

    @property
    def delay_s(self) -> float:
        """How long to wait before the next start."""
        return max(0.0, self._not_before - time.monotonic())

    @property
    def vacant_s(self) -> float:
        """How long ago the last server that has served ended; infinite if none did."""
        return math.inf if self.vacant_since is None else time.monotonic() - self.vacant_since

    @property
    def exhausted(self) -> bool:
        return self._crashes >= CRASH_LIMIT

    def replaced(self) -> None:
        """Count a server that an operator has replaced."""
        self._vacant()

    def ended(self, reason: str, ready_at: float | None) -> None:
        """Count a server that has ended by itself. It was ready since *ready_at*; None if it never was."""
        self._vacant()
        self.last_end, self._last_end_at = reason, _elapsed()
        lived_s = 0.0 if ready_at is None else time.monotonic() - ready_at
        self._crashes = self._crashes + 1 if lived_s < STABLE_S else 0
        self._back_off(self._crashes - IMMEDIATE_RESTARTS)

    def _vacant(self) -> None:
        self.restarts += 1
        self.vacant_since = time.monotonic()

    def standby_failed(self, reason: str, *, alone: bool) -> None:
        """Count a standby that could not start, or ended before it served. *alone*: no server serves meanwhile."""
        self._failed_standbys += 1
        if alone:
            self._crashes += 1
            self.last_end, self._last_end_at = reason, _elapsed()
        self._back_off(self._failed_standbys)

    def standby_promoted(self) -> None:
        self._failed_standbys = 0

    def reset_delay(self) -> None:
        """Allow a start at once: an operator has asked for it."""
        self._not_before = 0.0

    def reset(self) -> None:
        """Forget earlier failures: servers come from elsewhere now."""
        self._crashes = self._failed_standbys = 0
        self._not_before = 0.0

    def _back_off(self, times: int) -> None:
        if times > 0:
            self._not_before = time.monotonic() + min(BACKOFF_S * 2 ** (times - 1), BACKOFF_LIMIT_S)


def _elapsed() -> float:
    """Seconds since the boot, those of a suspended host among them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
