"""Recent failures: what the store did not give until the deadline is not asked for again at once.

A program that maps a file faults page by page, and the kernel asks up to three times for each: without this, each of
them would wait for the deadline.
"""

import math

import trio

from trimsfs.errors import StoreUnavailableError

REMEMBERED_S = 5.0


class RecentFailures:
    """Fetches that failed, by the tokens of their blobs. A failure counts for REMEMBERED_S seconds."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[float, str]] = {}

    def add(self, token: str, error: StoreUnavailableError) -> None:
        """The store did not give some bytes of a blob."""
        now = trio.current_time()
        # Those that count no more are dropped here, so that there are few.
        self._failures = {one: found for one, found in self._failures.items() if now < found[0] + REMEMBERED_S}
        self._failures[token] = now, str(error)

    def problem(self, token: str, *, since: float) -> str | None:
        """Why a fetch of a blob failed of late, and after the time *since*; None if none did."""
        failed_at, problem = self._failures.get(token, (-math.inf, ""))
        counts = failed_at > since and trio.current_time() < failed_at + REMEMBERED_S
        return problem if counts else None
