"""The fetcher as others use it: it makes bytes of blobs readable. A mount of several stores has one for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import trio

from trimsfs.fetch.bypass import AccessPattern
from trimsfs.fetch.flights import Urgency
from trimsfs.origins import ByPath
from trimsfs.tiers.blob import Blob
from trimsfs.types import Buffer, ChunkRecord


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


class Fetcher(Protocol):
    """Makes bytes of blobs readable. The methods are those of `StoreFetcher`, which tells what they do."""

    def statistics(self) -> FetchStatistics: ...

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def seconds_for(self, blob: Blob, size: int) -> float | None: ...

    def quiet_s(self) -> float: ...

    async def read(self, blob: Blob, start: int, stop: int) -> Buffer: ...

    async def read_once(
        self, blob: Blob, start: int, stop: int, pattern: AccessPattern | None = None
    ) -> Buffer | None: ...

    def expected(self, blob: Blob) -> bool: ...

    def hold(self, blob: Blob) -> None: ...

    def unhold(self, blob: Blob) -> None: ...

    async def fetch_all(self, blob: Blob, urgency: Urgency = Urgency.WANTED, *, guessed: bool = False) -> None: ...

    async def fetch_for_others(self, blob: Blob, chunks: range) -> None: ...

    async def are_here(self, blob: Blob, chunks: range) -> bool: ...

    async def refetch(self, blob: Blob, chunk: int, descriptor: int) -> ChunkRecord: ...


class Fetchers:
    """A `Fetcher` for a mount of several stores: that of the store which a blob comes from.

    So requests to a store that is slow, or away, take nothing from the others. *elsewhere* is for files of stores that
    the mount has no more, which an earlier server has opened.
    """

    def __init__(self, fetchers: Mapping[str, Fetcher], elsewhere: Fetcher) -> None:
        self._fetchers = ByPath(fetchers, elsewhere=elsewhere)
        self._all = (*fetchers.values(), elsewhere)

    def statistics(self) -> FetchStatistics:
        """The sums of all stores' statistics."""
        return summed([fetcher.statistics() for fetcher in self._fetchers.values()])

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            for fetcher in self._all:
                await nursery.start(fetcher.run)
            task_status.started()

    def seconds_for(self, blob: Blob, size: int) -> float | None:
        return self._of(blob).seconds_for(blob, size)

    def quiet_s(self) -> float:
        return min(fetcher.quiet_s() for fetcher in self._all)

    async def read(self, blob: Blob, start: int, stop: int) -> Buffer:
        return await self._of(blob).read(blob, start, stop)

    async def read_once(self, blob: Blob, start: int, stop: int, pattern: AccessPattern | None = None) -> Buffer | None:
        return await self._of(blob).read_once(blob, start, stop, pattern)

    def expected(self, blob: Blob) -> bool:
        return self._of(blob).expected(blob)

    def hold(self, blob: Blob) -> None:
        self._of(blob).hold(blob)

    def unhold(self, blob: Blob) -> None:
        self._of(blob).unhold(blob)

    async def fetch_all(self, blob: Blob, urgency: Urgency = Urgency.WANTED, *, guessed: bool = False) -> None:
        await self._of(blob).fetch_all(blob, urgency, guessed=guessed)

    async def fetch_for_others(self, blob: Blob, chunks: range) -> None:
        await self._of(blob).fetch_for_others(blob, chunks)

    async def are_here(self, blob: Blob, chunks: range) -> bool:
        return await self._of(blob).are_here(blob, chunks)

    async def refetch(self, blob: Blob, chunk: int, descriptor: int) -> ChunkRecord:
        return await self._of(blob).refetch(blob, chunk, descriptor)

    def _of(self, blob: Blob) -> Fetcher:
        return self._fetchers.of(blob.generation.file)  # not `key`: a blob may be used by other names later


def summed(parts: Sequence[FetchStatistics]) -> FetchStatistics:
    """The statistics of several fetchers together; the rate is None before any has measured one."""
    totals = {field.name: sum(getattr(part, field.name) or 0 for part in parts) for field in fields(FetchStatistics)}
    return FetchStatistics(**totals | {"rate": totals["rate"] if any(part.rate for part in parts) else None})
