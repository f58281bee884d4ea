"""Questions that take longer than those who ask wait: the work goes on, and the next who asks gets its result."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore
from trimsfs.concurrency.late_answers import KEPT_S, MOST, LateAnswers
from trimsfs.errors import StoreThrottledError, TransientStoreError
from trimsfs.namespace.tree import Namespace
from trimsfs.stores.layouts.hf_cache import HfCacheStore
from trimsfs.stores.retrying import Retrying, RetryingStore
from trimsfs.types import Generation

TTL_S = 60.0


class Source:
    """Answers with the number of the question, after *takes_s*."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s = takes_s
        self.asked = self.ended = 0

    async def __call__(self) -> int:
        self.asked += 1
        number, takes_s = self.asked, self.takes_s
        try:
            await trio.sleep(takes_s)
            return number
        finally:
            self.ended += 1


async def patiently(seconds: float, ask: Callable[[], Awaitable[int]]) -> int | None:
    with trio.move_on_after(seconds):
        return await ask()
    return None


async def test_an_answer_that_took_too_long_is_given_to_the_next_who_asks(autojump_clock: MockClock) -> None:
    late, source = LateAnswers[int](), Source(10)

    async def ask() -> int:
        return await late.of("key", source)

    assert await patiently(3, ask) is None
    assert [await patiently(3, ask), await patiently(9, ask)] == [None, 1]
    assert source.asked == 1
    assert await patiently(3, ask) is None
    await trio.sleep(60)
    assert await patiently(3, ask) == 2  # while a new question is under way
    assert [await patiently(20, ask), source.asked] == [3, 3]


async def test_answers_that_come_in_time_are_all_new(autojump_clock: MockClock) -> None:
    late, source = LateAnswers[int](), Source(0.2)
    assert [await late.of("key", source) for _ in range(3)] == [1, 2, 3]
    source.takes_s = 2
    assert await patiently(1, lambda: late.of("key", source)) is None
    await trio.sleep(5)
    source.takes_s = 0.2
    assert await late.of("key", source) == 5, "a late answer although there was a new one"


async def test_an_old_late_answer_is_not_given(autojump_clock: MockClock) -> None:
    late, source = LateAnswers[int](), Source(10)
    assert await patiently(1, lambda: late.of("key", source)) is None
    await trio.sleep(KEPT_S)
    assert await late.of("key", source) == 2


async def test_errors_are_raised_and_forgotten(autojump_clock: MockClock) -> None:
    late = LateAnswers[int]()

    async def fail() -> int:
        await trio.sleep(2)
        raise TransientStoreError("away")

    for patience_s in (5, 1, 5):
        with pytest.raises(TransientStoreError) if patience_s == 5 else trio.move_on_after(1):
            await late.of("key", fail)
    assert await patiently(1, lambda: late.of("key", fail)) is None
    await trio.sleep(5)
    assert await late.of("key", Source(2)) == 1


async def test_few_questions_go_on_and_none_when_it_is_closed(autojump_clock: MockClock) -> None:
    late, source = LateAnswers[int](), Source(100)

    async def ask(key: str) -> None:
        await patiently(1, lambda: late.of(key, source))

    async with trio.open_nursery() as nursery:
        for number in range(2 * MOST):
            nursery.start_soon(ask, f"{number % (MOST + 1)}")
    await trio.testing.wait_all_tasks_blocked()
    assert source.asked - source.ended == MOST
    late.close()
    await trio.testing.wait_all_tasks_blocked()
    assert source.asked == source.ended


# In the layout of a Hugging Face cache


def repository(directories: int) -> MemoryStore:
    return MemoryStore({f"org/m/{number:03}/x": b"old" for number in range(directories)})


async def test_a_repository_that_takes_long_to_list_is_seen_to_change(autojump_clock: MockClock) -> None:
    """12 s, longer than any lookup with an older answer waits."""
    inner = repository(300)
    inner.delay(0.04)
    store = HfCacheStore(inner, None, share_links=True)
    retrying = Retrying(deadline_s=15, on_failure=None, reached=True)
    namespace = Namespace(RetryingStore(store, retrying), ttl_s=TTL_S, impatient=store, breaker=retrying.breaker)

    async def commit() -> str:
        found, _ = await namespace.lookup("models--org--m/refs/", b"main")
        assert isinstance(found, Generation)
        return found.etag

    first = await commit()
    inner.put("org/m/001/x", b"new")
    for _ in range(5):
        await trio.sleep(TTL_S + 1)
        if await commit() != first:
            return
    pytest.fail("the new commit was never shown")


async def test_one_page_that_fails_does_not_begin_a_walk_anew(autojump_clock: MockClock) -> None:
    inner = repository(50)
    store = HfCacheStore(inner, None, share_links=True)
    retrying = RetryingStore(store, Retrying(deadline_s=15, on_failure=None))
    inner.fail(StoreThrottledError("slow down"), key="org/m/025/")
    assert len((await retrying.list_page("models--org--m/refs/")).objects) == 1
    assert inner.count("list_page") == 1 + 50 + 1


async def test_a_store_that_is_away_is_asked_once_by_each_attempt(autojump_clock: MockClock) -> None:
    inner = repository(2)
    inner.fail(TransientStoreError("away"), times=float("inf"))
    with pytest.raises(TransientStoreError):
        await HfCacheStore(inner, None, share_links=True).list_page("models--org--m/refs/")
    assert inner.count("list_page") == 1
