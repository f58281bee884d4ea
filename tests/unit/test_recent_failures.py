"""What the store did not give until the deadline is not asked for again at once, and is after that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from tests.unit.workshop import DEADLINE_S, Bench, Workshop
from trimsfs.errors import StoreUnavailableError, TransientStoreError
from trimsfs.fetch.bypass import AccessPattern
from trimsfs.stores.recent_failures import REMEMBERED_S
from trimsfs.tiers.blob import Blob

AT_ONCE_S = 0.5


@pytest.fixture
async def bench(workshop: Workshop, mock_clock: MockClock) -> Bench:
    """A store that gives ``other``, and fails every read of ``a`` for a passing reason."""
    mock_clock.autojump_threshold = 0.02
    workshop.put("a", 10)
    workshop.put("other", 1)
    workshop.store.fail(TransientStoreError("reset"), key="a", method="read", times=float("inf"))
    return await workshop.bench()


@asynccontextmanager
async def answering(bench: Bench) -> AsyncIterator[None]:
    """The store answers other requests meanwhile."""

    async def answer() -> None:
        while True:
            bench.fetcher._retrying.breaker.answered()
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        yield
        nursery.cancel_scope.cancel()


async def failed_after(bench: Bench, blob: Blob, chunk: int) -> float:
    """How long a read of a chunk takes to fail, for the reason of the first."""
    began, start = trio.current_time(), chunk * blob.chunk_size
    with pytest.raises(StoreUnavailableError, match=r"^a at .*reset$"):
        await bench.read(blob, start, start + 1)
    return trio.current_time() - began


async def test_one_deadline_is_paid_for_all_reads_of_a_file(
    bench: Bench, caplog: pytest.LogCaptureFixture, mock_clock: MockClock
) -> None:
    blob, other = await bench.acquire("a"), await bench.acquire("other")
    async with answering(bench):
        assert await failed_after(bench, blob, 0) >= DEADLINE_S
        asked, told = bench.store.count("read"), len(caplog.records)
        for chunk in range(10):
            assert await failed_after(bench, blob, chunk) < AT_ONCE_S
        pattern = AccessPattern()
        pattern.random = True
        with pytest.raises(StoreUnavailableError):
            await bench.fetcher.read_once(blob, 0, 1, pattern)
        with pytest.raises(StoreUnavailableError):
            await bench.fetcher.fetch_all(blob)
        assert (bench.store.count("read"), len(caplog.records)) == (asked, told)
        assert await bench.read(other, 0, 1)


async def test_after_a_while_it_is_tried_anew(bench: Bench, mock_clock: MockClock) -> None:
    blob = await bench.acquire("a")
    async with answering(bench):
        await failed_after(bench, blob, 0)
        for _ in range(3):
            await trio.sleep(1)
            await failed_after(bench, blob, 1)  # which is no failure of its own
        await trio.sleep(REMEMBERED_S - 3)
        bench.store.heal()
        assert await bench.read(blob, 0, 1)


async def test_when_a_store_that_was_away_answers_it_is_tried_anew_at_once(bench: Bench, mock_clock: MockClock) -> None:
    blob = await bench.acquire("a")
    breaker = bench.fetcher._retrying.breaker
    await failed_after(bench, blob, 0)
    assert breaker.open
    assert await failed_after(bench, blob, 0) < AT_ONCE_S
    bench.store.heal()
    breaker.answered()
    assert await bench.read(blob, 0, 1)


async def test_the_reason_is_told_while_nothing_is_fetched(bench: Bench, mock_clock: MockClock) -> None:
    blob = await bench.acquire("a")
    problem = bench.fetcher._retrying.problem
    async with answering(bench):
        assert problem(blob.token) is None
        await failed_after(bench, blob, 0)
        assert problem(blob.token) == "a at 0: reset"
        assert problem((await bench.acquire("other")).token) is None
        await trio.sleep(REMEMBERED_S)
        assert problem(blob.token) is None
