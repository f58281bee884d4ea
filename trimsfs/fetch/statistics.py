"""What is counted of fetching."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchStatistics:
    """Counts since the server started, and requests under way now; ``rate`` is the recent one, in bytes a second."""

    fetched_bytes: int
    fetched_chunks: int
    failed_chunks: int
    verified_chunks: int
    uncached_chunks: int
    in_flight: int
    waiting: int
    request_limit: int
    rate: float | None
