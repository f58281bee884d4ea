from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from trimsfs.concurrency.adaptive_limit import AdaptiveLimit

SIZE = 8 << 20


def drive(limit: AdaptiveLimit, latency: Callable[[int], float], requests: int) -> list[int]:
    """The limits while *requests* end one after the other, always as many under way as the limit allows."""
    limits = []
    for _ in range(requests):
        under_way = limit.limit
        limit.succeeded(latency(under_way), under_way, size=SIZE)
        limits.append(limit.limit)
    return limits


def queueing(capacity: int, latency_s: float = 0.1) -> Callable[[int], float]:
    """A store that serves *capacity* requests at once and lets the others wait."""
    return lambda under_way: latency_s * max(1.0, under_way / capacity)


def test_rises_to_the_maximum_while_latency_stays_the_same() -> None:
    limit = AdaptiveLimit(maximum=32)
    drive(limit, lambda _: 0.1, 100)
    assert limit.limit == 32


def test_does_not_rise_when_fewer_requests_than_allowed_are_under_way() -> None:
    limit = AdaptiveLimit(maximum=32)
    before = limit.limit
    for _ in range(100):
        limit.succeeded(0.1, before - 1, size=SIZE)
    assert limit.limit == before


def test_a_request_for_more_may_take_longer_than_one_for_less() -> None:
    limit = AdaptiveLimit(maximum=32)
    for _ in range(100):
        for chunks in (1, 4):
            limit.succeeded(0.1 * chunks, limit.limit, size=chunks * SIZE)
    assert limit.limit == 32


def test_begins_where_a_fast_store_is_used_and_a_slow_one_not_flooded() -> None:
    assert AdaptiveLimit(maximum=64).limit == 16
    assert AdaptiveLimit(maximum=3).limit == 3


def test_a_short_queue_is_left_as_it_is() -> None:
    """Between the two bounds there is neither room for more nor need for less."""
    limit = AdaptiveLimit(maximum=64)
    limit.succeeded(1.0, 16, size=SIZE)
    before = limit.limit
    for queued in (4.5, 6.0, 7.5):
        limit.succeeded(1 / (1 - queued / before), before, size=SIZE)
    assert limit.limit == before


def test_falls_when_requests_take_longer_than_the_best_did() -> None:
    limit = AdaptiveLimit(maximum=32)
    drive(limit, lambda _: 0.1, 100)
    for _ in range(8):
        limit.succeeded(0.4, limit.limit, size=SIZE)
    assert limit.limit == 24


def test_stays_near_what_the_store_serves_without_queueing() -> None:
    limit = AdaptiveLimit(maximum=64)
    limits = drive(limit, queueing(capacity=10), 2000)
    assert min(limits[200:]) >= 8
    assert max(limits[200:]) <= 10 + 8 + 4  # with the queue that is wanted, and what each probe misjudges


def test_learns_anew_when_the_store_has_become_slower() -> None:
    limit = AdaptiveLimit(maximum=16)
    drive(limit, lambda _: 0.1, 100)
    limits = drive(limit, lambda _: 0.3, 500)
    assert min(limits) < 16
    assert max(limits[-300:]) == 16


def test_one_answer_too_quick_to_measure_does_not_hold_the_limit_down() -> None:
    limit = AdaptiveLimit(maximum=16)
    limit.succeeded(0.0, 1, size=SIZE)
    limits = drive(limit, lambda _: 0.1, 1000)
    assert max(limits[-300:]) == 16


def test_halves_when_throttled_but_once_a_second() -> None:
    limit = AdaptiveLimit(maximum=64, value=64.0)
    limit.throttled(100.0)
    assert limit.limit == 32
    limit.throttled(100.5)
    limit.throttled(100.999)
    assert limit.limit == 32
    limit.throttled(101.0)
    assert limit.limit == 16


def test_recovers_after_throttling() -> None:
    limit = AdaptiveLimit(maximum=16, value=16.0)
    for second in range(10):
        limit.throttled(float(second))
    assert limit.limit == limit.minimum == 2
    drive(limit, lambda _: 0.1, 50)
    assert limit.limit == 16


@given(
    maximum=st.integers(1, 100),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("succeeded"), st.floats(0, 100), st.integers(1, 100), st.integers(1, 3)),
            st.tuples(st.just("throttled"), st.floats(0, 1e6), st.just(0), st.just(0)),
        )
    ),
)
def test_stays_in_its_bounds_whatever_happens(maximum: int, events: list[tuple[str, float, int, int]]) -> None:
    limit = AdaptiveLimit(maximum=maximum)
    assert 1 <= limit.limit <= maximum
    for kind, number, under_way, size in events:
        if kind == "succeeded":
            limit.succeeded(number, under_way, size=size)
        else:
            limit.throttled(number)
        assert min(2, maximum) <= limit.limit <= maximum
