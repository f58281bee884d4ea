"""The statistics of fetching."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchStatistics:
    """Counts since the server started, except for those of the present.

    ``in_flight`` is batches under way now, ``waiting`` demanded chunks in the queue, ``rate`` recent bytes a second.
    """

    fetched_bytes: int
    fetched_chunks: int
    copied_bytes: int
    failed_chunks: int
    verified_chunks: int
    uncached_chunks: int
    in_flight: int
    waiting: int
    request_limit: int
    rate: float | None
