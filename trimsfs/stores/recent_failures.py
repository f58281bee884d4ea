"""Recent failures: after a fetch has failed until the deadline, other fetches of its blob fail at once for a while.

A program that maps a file faults page by page, and the kernel asks up to three times for each page. Without this, each
request would wait for the deadline.
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
        """Record that the store did not give some bytes of a blob."""
        now = trio.current_time()
        # Drop expired failures here, so that there are few.
        self._failures = {one: failure for one, failure in self._failures.items() if now < failure[0] + REMEMBERED_S}
        self._failures[token] = now, str(error)

    def problem(self, token: str, *, since: float) -> str | None:
        """Why a fetch of a blob failed recently, and after the time *since*; None if none did."""
        failed_at, problem = self._failures.get(token, (-math.inf, ""))
        counts = failed_at > since and trio.current_time() < failed_at + REMEMBERED_S
        return problem if counts else None
