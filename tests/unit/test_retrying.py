import math
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore, as_store
from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreSlowError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
    StoreUnclearError,
    TransientStoreError,
    WorkerLostError,
)
from trimsfs.stores.retrying import CROWDED_DEADLINES, LONGEST_WAIT_S, MOST_LOST, MOST_SLOW, Retrying, RetryingStore
from trimsfs.types import Generation

DEADLINE_S = 15.0
CONTENT = b"0123456789"


class Attempts(MemoryStore):
    """Remembers when each request began."""

    def __init__(self) -> None:
        super().__init__({"a": CONTENT, "dir/b": b"b"})
        self.times: list[float] = []

    async def stat(self, key: str) -> Generation:
        self.times.append(trio.current_time())
        return await super().stat(key)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"a": CONTENT, "dir/b": b"b"})


@pytest.fixture
def heard() -> list[TransientStoreError]:
    """Every failed attempt."""
    return []


@pytest.fixture
def policy(heard: list[TransientStoreError]) -> Retrying:
    return Retrying(deadline_s=DEADLINE_S, on_failure=heard.append)


@pytest.fixture
def retrying(store: MemoryStore, policy: Retrying) -> RetryingStore:
    return RetryingStore(as_store(store), policy)


@pytest.fixture
def longest_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the jitter's upper end each time."""
    monkeypatch.setattr("random.uniform", lambda _low, high: high)


async def test_every_call_reaches_the_store(store: MemoryStore, policy: Retrying, retrying: RetryingStore) -> None:
    await retrying.probe()
    page = await retrying.list_page("", limit=1)
    assert [generation.key for generation in page.objects] == ["a"]
    rest = await retrying.list_page("", token=page.next_token)
    assert rest.prefixes == ("dir/",)
    generation = await retrying.stat("a")
    received = bytearray()
    assert await retrying.read(generation, 3, 4, received.extend) is None
    assert received == b"3456"
    versioned = store.put("v", CONTENT, version_id="v1")
    assert await retrying.read(versioned, 0, 1, received.extend) == "v1"
    assert retrying.identity == store.identity
    assert not retrying.streaming
    assert RetryingStore(as_store(MemoryStore(streaming=True)), policy).streaming
    await retrying.aclose()
    assert store.closed
    assert policy.statistics().requests == 4
    assert policy.statistics().failed_attempts == 0


async def test_passing_failures_are_tried_again(
    store: MemoryStore, policy: Retrying, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    store.fail(TransientStoreError("reset"), times=2)
    store.fail(StoreThrottledError("slow down"), times=1)
    store.fail(StoreStalledError("no bytes"), times=1)
    generation = await retrying.stat("a")
    assert generation.size == len(CONTENT)
    assert store.count("stat") == 5
    assert policy.statistics().requests == 1
    assert policy.statistics().failed_attempts == 4


async def test_a_read_is_tried_once(
    store: MemoryStore, policy: Retrying, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    """What of it has come is known to who reads, not here."""
    error = TransientStoreError("reset")
    store.fail(error, method="read")
    with pytest.raises(TransientStoreError) as caught:
        await retrying.read(store.generation("a"), 0, len(CONTENT), bytearray().extend)
    assert caught.value is error
    assert store.count("read") == 1
    assert policy.statistics().requests == 0


async def test_errors_that_are_not_of_a_store_pass_at_once(policy: Retrying) -> None:
    async def attempt() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await policy.call("a", attempt)
    assert (policy.statistics().requests, policy.statistics().failed_attempts) == (1, 0)


async def test_gives_up_at_the_deadline_and_names_the_subject_and_the_last_cause(
    store: MemoryStore, policy: Retrying, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    store.fail(TransientStoreError("connection refused"), times=3)
    store.fail(TransientStoreError("no route to host"), times=float("inf"))
    began = trio.current_time()
    with pytest.raises(StoreUnavailableError, match=r"^a: no route to host$") as caught:
        await retrying.stat("a")
    assert isinstance(caught.value.__cause__, TransientStoreError)
    assert DEADLINE_S <= trio.current_time() - began <= DEADLINE_S + LONGEST_WAIT_S
    assert policy.statistics().failed_attempts == store.count("stat")


async def test_no_attempt_starts_after_the_deadline(autojump_clock: MockClock, longest_waits: None) -> None:
    store = Attempts()
    store.fail(TransientStoreError("connection refused"), times=float("inf"))
    began = trio.current_time()
    with pytest.raises(StoreUnavailableError):
        await RetryingStore(store, Retrying(deadline_s=DEADLINE_S, on_failure=None)).stat("a")
    # Nor does it give up before: whoever waits for the same store relies on the whole time.
    assert trio.current_time() - began >= DEADLINE_S
    assert max(store.times) - began <= DEADLINE_S + 1e-6


async def test_waits_grow_up_to_the_longest(autojump_clock: MockClock, longest_waits: None) -> None:
    store = Attempts()
    store.fail(TransientStoreError("connection refused"), times=8)
    await RetryingStore(store, Retrying(deadline_s=60, on_failure=None)).stat("a")
    waits = [after - before for before, after in zip(store.times, store.times[1:], strict=False)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0])


async def test_waits_are_spread(autojump_clock: MockClock) -> None:
    firsts = set()
    for _ in range(5):
        store = Attempts()
        store.fail(TransientStoreError("connection refused"), times=1)
        await RetryingStore(store, Retrying(deadline_s=60, on_failure=None)).stat("a")
        firsts.add(store.times[1] - store.times[0])
    assert len(firsts) == 5
    assert all(0 <= wait <= 0.1 for wait in firsts)


@pytest.mark.parametrize("times", [2, 1000])
async def test_a_lost_fetch_process_says_nothing_of_the_store(
    policy: Retrying, heard: list[TransientStoreError], autojump_clock: MockClock, times: int
) -> None:
    lost = 0

    async def attempt() -> bytes:
        nonlocal lost
        if lost < times:
            lost += 1
            await trio.sleep(2 * DEADLINE_S)
            raise WorkerLostError("the fetch process did not answer")
        return CONTENT

    if times == 2:
        assert await policy.call("a", attempt) == CONTENT
    else:
        with pytest.raises(StoreUnavailableError, match="did not answer"):
            await policy.call("a", attempt)
        assert lost == MOST_LOST + 1
    statistics = policy.statistics()
    assert (statistics.circuit_openings, statistics.failed_attempts, heard) == (0, 0, [])
    measured = {label: buckets[-1][1] for label, buckets, _ in statistics.request_seconds.buckets()}
    assert measured.pop("success") == (times == 2)
    assert sum(measured.values()) == 0


async def test_the_deadline_counts_from_what_the_store_gave_last(autojump_clock: MockClock) -> None:
    retrying = Retrying(deadline_s=DEADLINE_S, on_failure=None)
    heard = began = trio.current_time()

    async def attempt() -> None:
        nonlocal heard
        if trio.current_time() - began < 5 * DEADLINE_S:
            await trio.sleep(2)
            heard = trio.current_time()
            retrying.breaker.answered()
        raise TransientStoreError("reset")

    with pytest.raises(StoreUnavailableError):
        await retrying.call("a", attempt, heard=lambda: heard)
    assert trio.current_time() - heard == pytest.approx(DEADLINE_S)
    assert heard - began > 5 * DEADLINE_S - LONGEST_WAIT_S - 2


async def test_an_attempt_under_way_is_not_cut_at_the_deadline(
    store: MemoryStore, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    store.delay(10 * DEADLINE_S, method="stat")
    assert (await retrying.stat("a")).key == "a"


async def test_a_slow_failure_after_the_deadline_is_the_last(
    store: MemoryStore, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    store.delay(DEADLINE_S)
    store.fail(StoreStalledError("no bytes"), times=float("inf"))
    with pytest.raises(StoreUnavailableError):
        await retrying.probe()
    assert store.count("probe") == 1


@pytest.mark.parametrize(
    ("takes_s", "failures"),
    [
        pytest.param(10 * DEADLINE_S, 3 * [StoreSlowError("few bytes")], id="however late"),
        pytest.param(0.9 * DEADLINE_S, [*2 * [StoreSlowError("few bytes")], TransientStoreError("reset")], id="anew"),
    ],
)
async def test_after_a_slow_body_the_deadline_counts_anew(
    store: MemoryStore,
    policy: Retrying,
    retrying: RetryingStore,
    takes_s: float,
    failures: list[TransientStoreError],
    autojump_clock: MockClock,
) -> None:
    store.delay(takes_s, method="stat")
    for failure in failures:
        store.fail(failure)
    assert (await retrying.stat("a")).key == "a"
    assert policy.breaker.openings == 0


async def test_the_deadline_does_not_count_while_an_attempt_waits_for_its_turn(
    store: MemoryStore, policy: Retrying, autojump_clock: MockClock
) -> None:
    turns: list[float] = []

    async def turn() -> None:
        await trio.sleep(10 * DEADLINE_S)
        turns.append(trio.current_time())

    store.fail(TransientStoreError("reset"), times=3)
    assert (await policy.call("a", partial(store.stat, "a"), turn=turn)).key == "a"
    assert len(turns) == 3, "all but the first"
    store.fail(TransientStoreError("reset"), times=float("inf"))
    with pytest.raises(StoreUnavailableError, match="reset"):
        await policy.call("a", partial(store.stat, "a"), turn=turn)


async def test_a_request_of_a_crowded_store_has_more_time_but_ends(
    store: MemoryStore, policy: Retrying, autojump_clock: MockClock
) -> None:
    def others(until: float = math.inf) -> float:
        if trio.current_time() < until:
            policy.breaker.answered()
        return min(trio.current_time(), until)

    store.delay(DEADLINE_S / 3, method="stat")
    request = partial(policy.call, "a", partial(store.stat, "a"))
    store.fail(StoreStalledError("timeout"), times=9)
    assert (await request(others=others)).key == "a"
    store.fail(StoreStalledError("timeout"), times=float("inf"))
    began = trio.current_time()
    with pytest.raises(StoreUnavailableError, match="timeout"):
        await request(others=others)
    assert CROWDED_DEADLINES <= (trio.current_time() - began) / DEADLINE_S < CROWDED_DEADLINES + 1
    began = trio.current_time()
    with pytest.raises(StoreUnavailableError, match="timeout"):
        await request(others=partial(others, began + 3 * DEADLINE_S))
    assert 3 < (trio.current_time() - began) / DEADLINE_S < 5, "the deadline counts from the last bytes of others"


async def test_an_attempt_that_waits_for_its_turn_is_not_made_once_the_store_is_away(
    store: MemoryStore, policy: Retrying, autojump_clock: MockClock
) -> None:
    async def turn() -> None:
        policy.breaker.give_up(StoreUnavailableError("away"))

    store.fail(TransientStoreError("reset"), times=float("inf"))
    with pytest.raises(StoreUnavailableError, match="away"):
        await policy.call("a", partial(store.stat, "a"), turn=turn)
    assert store.count("stat") == 1


async def test_bodies_that_are_slow_for_ever_end_and_open_no_breaker(
    store: MemoryStore, policy: Retrying, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    store.delay(2 * DEADLINE_S, method="stat")
    store.fail(StoreSlowError("few bytes"), times=float("inf"))
    with pytest.raises(StoreUnavailableError, match="few bytes"):
        await retrying.stat("a")
    assert store.count("stat") == MOST_SLOW + 1
    assert policy.breaker.openings == 0


async def test_a_store_that_is_gone_once_reached_is_away(store: MemoryStore, autojump_clock: MockClock) -> None:
    policy = Retrying(deadline_s=DEADLINE_S, on_failure=None, reached=True)
    store.fail(BucketNotFoundError("no directory"), times=float("inf"))
    began = trio.current_time()
    with pytest.raises(StoreUnavailableError, match="no directory"):
        await RetryingStore(as_store(store), policy).probe()
    assert trio.current_time() - began >= DEADLINE_S
    assert policy.breaker.open


@pytest.mark.parametrize(
    "error",
    [
        ObjectNotFoundError("gone"),
        ObjectChangedError("changed"),
        StoreAccessError("denied"),
        BucketNotFoundError("no bucket"),
        StoreUnavailableError("odd"),
    ],
)
async def test_lasting_failures_pass_at_once(
    store: MemoryStore,
    policy: Retrying,
    heard: list[TransientStoreError],
    retrying: RetryingStore,
    autojump_clock: MockClock,
    error: StoreError,
) -> None:
    store.fail(error)
    began = trio.current_time()
    with pytest.raises(type(error)) as caught:
        await retrying.stat("a")
    assert caught.value is error
    assert trio.current_time() == began
    assert store.count("stat") == 1
    assert heard == []
    assert policy.statistics().failed_attempts == isinstance(error, StoreAccessError)  # a refusal counts


async def test_every_failed_attempt_is_heard_of_also_the_last(
    store: MemoryStore, heard: list[TransientStoreError], retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    error = StoreThrottledError("slow down")
    store.fail(error, times=float("inf"))
    with pytest.raises(StoreUnavailableError):
        await retrying.list_page("dir/")
    assert heard == [error] * store.count("list_page")
    assert len(heard) > 3


async def test_cancelling_ends_the_retries(
    store: MemoryStore, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    store.fail(TransientStoreError("reset"), times=float("inf"))
    with trio.move_on_after(1) as scope:
        await retrying.probe()
    assert scope.cancelled_caught
    count = store.count("probe")
    await trio.sleep(20)
    assert store.count("probe") == count


async def test_an_unclear_failure_of_a_store_that_refuses_all_is_a_refusal(
    store: MemoryStore, policy: Retrying, retrying: RetryingStore, autojump_clock: MockClock
) -> None:
    """As of HEAD, whose answer has no code: the probe's has."""
    store.fail(StoreUnclearError("400: Bad Request"), times=100, method="stat")

    async def probe() -> None:
        raise StoreAccessError("the token has expired: renew the credentials")

    async with trio.open_nursery() as nursery:
        await nursery.start(policy.breaker.run, probe)
        began = trio.current_time()
        with pytest.raises(StoreAccessError, match=r"^a: the token has expired: renew the credentials$"):
            await retrying.stat("a")
        assert trio.current_time() - began < DEADLINE_S / 2
        nursery.cancel_scope.cancel()
