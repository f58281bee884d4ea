"""How the servers of a mount have fared, and so when the next may start, or none any more."""

import time

STABLE_S = 1.0
"""A server that dies sooner after it was ready has not worked."""
SHORT_LIVES = 6
"""So many in a row, and no other is started: whoever waits for an answer is better served with an error."""
AT_ONCE = 2
"""So many in a row are followed without a delay."""
BACKOFF_S, BACKOFF_LIMIT_S = 0.1, 5.0


class Lives:
    """Counts servers that have ended."""

    def __init__(self) -> None:
        self.restarts = 0
        """Servers that others have followed."""
        self.last_end: str | None = None
        self.last_end_at: float | None = None
        """How the last one ended that nobody meant to, and when, in seconds since the epoch."""
        self._short = self._failed_standbys = 0
        self._not_before = 0.0

    @property
    def delay_s(self) -> float:
        """For how long no other is to be started."""
        return max(0.0, self._not_before - time.monotonic())

    @property
    def hopeless(self) -> bool:
        """Whether servers end at once, again and again."""
        return self._short >= SHORT_LIVES

    def replaced(self) -> None:
        """A server has made way for another, as it was meant to."""
        self.restarts += 1

    def ended(self, fate: str, ready_at: float | None) -> None:
        """A server has ended that served; *ready_at* is when it began to, by the monotonic clock."""
        self.restarts += 1
        self.last_end, self.last_end_at = fate, time.time()
        lived_s = 0.0 if ready_at is None else time.monotonic() - ready_at
        self._short = self._short + 1 if lived_s < STABLE_S else 0
        self._wait(self._short - AT_ONCE)

    def standby_failed(self, fate: str, *, alone: bool) -> None:
        """One that was to stand by has not come to that; *alone* tells that nobody serves meanwhile."""
        self._failed_standbys += 1
        if alone:
            self._short += 1
            self.last_end, self.last_end_at = fate, time.time()
        self._wait(self._failed_standbys)

    def standby_came(self) -> None:
        """One stands by, and is to serve."""
        self._failed_standbys = 0

    def hurry(self) -> None:
        """Start the next one at once: somebody has ordered it."""
        self._not_before = 0.0

    def _wait(self, times: int) -> None:
        if times > 0:
            self._not_before = time.monotonic() + min(BACKOFF_S * 2 ** (times - 1), BACKOFF_LIMIT_S)
