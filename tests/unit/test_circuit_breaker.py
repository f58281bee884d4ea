"""When requests to a store that fails are no longer made, and when they are again."""

import itertools
import logging
import math
import os

import pytest
import trio
from trio.testing import MockClock

from trimsfs.errors import StoreAccessError, StoreUnavailableError, TransientStoreError
from trimsfs.handover.ledger import Ledger
from trimsfs.stores.circuit_breaker import (
    ATTEMPTS,
    FORGOTTEN_AFTER_S,
    PROBE_INTERVAL_S,
    PROBE_TIMEOUT_S,
    READS_REFUSED,
    REFUSED_INTERVAL_S,
    TOLD_AFTER_S,
    CircuitBreaker,
)
from trimsfs.stores.retrying import LONGEST_WAIT_S, Retrying

DEADLINE_S = 15.0


@pytest.fixture
def breaker() -> CircuitBreaker:
    return CircuitBreaker(deadline_s=DEADLINE_S)


async def fail(breaker: CircuitBreaker, *, for_s: float, every_s: float = 1.0) -> None:
    """One request of a caller that tries again and again."""
    began = trio.current_time()
    breaker.failed(TransientStoreError("reset"), began)
    while trio.current_time() < began + for_s:
        await trio.sleep(every_s)
        breaker.failed(TransientStoreError("reset"), began)


async def test_a_failure_is_no_outage(breaker: CircuitBreaker, autojump_clock: MockClock) -> None:
    await fail(breaker, for_s=DEADLINE_S - 1)
    assert breaker.failing
    assert not breaker.open
    breaker.check("a")


async def test_it_opens_when_a_request_has_failed_until_its_deadline(
    breaker: CircuitBreaker, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    await fail(breaker, for_s=DEADLINE_S)
    assert breaker.open
    with pytest.raises(StoreUnavailableError, match=r"^a: the store does not answer: reset$"):
        breaker.check("a")
    assert breaker.openings == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_it_opens_though_each_attempt_takes_long(breaker: CircuitBreaker, autojump_clock: MockClock) -> None:
    await fail(breaker, for_s=DEADLINE_S, every_s=FORGOTTEN_AFTER_S + 2)
    assert breaker.open


async def test_any_answer_closes_it(breaker: CircuitBreaker, autojump_clock: MockClock) -> None:
    await fail(breaker, for_s=DEADLINE_S)
    breaker.answered()
    assert not breaker.failing
    breaker.check("a")


async def test_a_request_that_fails_among_others_that_do_not_opens_nothing(
    breaker: CircuitBreaker, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: fail(breaker, for_s=4 * DEADLINE_S))
        for _ in range(8):
            await trio.sleep(DEADLINE_S / 2)
            breaker.answered()
            assert not breaker.open


async def test_what_was_not_heard_of_for_a_while_is_tried_again(
    breaker: CircuitBreaker, autojump_clock: MockClock
) -> None:
    await fail(breaker, for_s=DEADLINE_S)
    await trio.sleep(FORGOTTEN_AFTER_S)
    breaker.check("a")


@pytest.mark.parametrize(
    ("ends", "interval_s"),
    [(None, math.inf), (StoreAccessError("not allowed"), REFUSED_INTERVAL_S)],
    ids=["answers", "refuses"],
)
async def test_a_store_that_fails_is_probed_until_it_answers(
    breaker: CircuitBreaker, ends: StoreAccessError | None, interval_s: float, autojump_clock: MockClock
) -> None:
    probed = list[float]()
    down = True

    async def probe() -> None:
        probed.append(trio.current_time())
        if down:
            raise TransientStoreError("reset")
        if ends is not None:
            raise ends

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.run, probe)
        await trio.sleep(100)
        assert probed == []
        began = trio.current_time()
        breaker.failed(TransientStoreError("reset"), began)
        await trio.sleep(2 * DEADLINE_S)
        assert breaker.open
        assert len(probed) <= 2 * DEADLINE_S / PROBE_INTERVAL_S
        down = False
        await trio.sleep(1.1 * PROBE_INTERVAL_S)
        assert not breaker.failing
        count = len(probed)
        await trio.sleep(100)
        assert 0.8 * 100 / interval_s <= len(probed) - count <= 100 / interval_s
        assert breaker.refusal == (None if ends is None else "not allowed")
        nursery.cancel_scope.cancel()


async def test_a_refused_request_has_the_store_probed_which_tells_whether_it_refuses_all(
    breaker: CircuitBreaker, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    refuses = False

    async def probe() -> None:
        if refuses:
            raise StoreAccessError("bucket b: not allowed")

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.run, probe)
        breaker.refused()
        assert not breaker.known
        await trio.sleep(PROBE_INTERVAL_S)
        assert (breaker.known, breaker.refusal, breaker.refused_attempts) == (True, None, 1)
        refuses = True
        breaker.refused()
        await trio.sleep(PROBE_INTERVAL_S)
        assert (breaker.refusal, breaker.open) == ("bucket b: not allowed", False)
        refuses = False
        await trio.sleep(REFUSED_INTERVAL_S + PROBE_INTERVAL_S)
        assert breaker.refusal is None
        nursery.cancel_scope.cancel()
    assert [record.message for record in caplog.records] == [
        "the store refuses: bucket b: not allowed",
        "the store no longer refuses",
    ]


async def test_a_failure_is_known_once_it_is_told(breaker: CircuitBreaker, autojump_clock: MockClock) -> None:
    await fail(breaker, for_s=TOLD_AFTER_S / 2)
    assert (breaker.known, breaker.outage) == (False, None)
    await trio.sleep(TOLD_AFTER_S / 2)
    assert (breaker.known, breaker.outage) == (True, (TOLD_AFTER_S, "reset"))
    breaker.answered()
    assert (breaker.known, breaker.outage) == (True, None)


async def test_reads_are_refused_while_none_was_answered(breaker: CircuitBreaker) -> None:
    breaker.refused(read=True)
    assert breaker.refusal == READS_REFUSED
    breaker.has_read()
    breaker.refused(read=True)
    assert breaker.refusal is None


async def test_a_probe_that_is_not_answered_is_given_up(breaker: CircuitBreaker, autojump_clock: MockClock) -> None:
    assert PROBE_INTERVAL_S + PROBE_TIMEOUT_S < FORGOTTEN_AFTER_S
    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.run, trio.sleep_forever)
        breaker.failed(TransientStoreError("reset"), trio.current_time())
        await trio.sleep(2 * DEADLINE_S)
        for _ in range(100):
            assert breaker.open
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()


async def test_all_who_wait_fail_as_soon_as_one_has_waited_in_vain(
    breaker: CircuitBreaker, autojump_clock: MockClock
) -> None:
    retrying = Retrying(deadline_s=DEADLINE_S, on_failure=None, breaker=breaker)
    took = list[float]()

    async def attempt() -> None:
        raise TransientStoreError("reset")

    async def call(after_s: float) -> None:
        await trio.sleep(after_s)
        began = trio.current_time()
        with pytest.raises(StoreUnavailableError, match="reset"):
            await retrying.call("a", attempt)
        took.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for after_s in (0, 5, 10, DEADLINE_S + 1):
            nursery.start_soon(call, after_s)
    assert sorted(took) == pytest.approx([0, 5, 10, DEADLINE_S], abs=0.01)


async def test_what_needs_no_store_goes_on(breaker: CircuitBreaker, autojump_clock: MockClock) -> None:
    retrying = Retrying(deadline_s=DEADLINE_S, on_failure=None, breaker=breaker)
    await fail(breaker, for_s=DEADLINE_S)
    before, attempts = retrying.statistics(), itertools.count()

    async def attempt() -> int:
        if not next(attempts):
            raise TransientStoreError("interrupted")
        return 5

    assert await retrying.call_locally("a", attempt) == 5
    assert next(attempts) == 2
    after = retrying.statistics()  # of the store
    assert (after.requests, after.failed_attempts) == (before.requests, before.failed_attempts) == (0, 0)
    assert not any(sum(series.counts) for series in map(after.request_seconds.series, ("success", "transient")))
    assert breaker.open
    with pytest.raises(StoreUnavailableError):
        await retrying.call("a", attempt)


async def test_the_next_server_does_not_wait_to_find_out(autojump_clock: MockClock) -> None:
    descriptor = os.memfd_create("ledger")
    try:
        first = CircuitBreaker(deadline_s=DEADLINE_S, ledger=Ledger(os.dup(descriptor)))
        await fail(first, for_s=DEADLINE_S)
        second = CircuitBreaker(deadline_s=DEADLINE_S, ledger=Ledger(os.dup(descriptor)))
        assert second.problem == first.problem
        second.answered()
        assert not CircuitBreaker(deadline_s=DEADLINE_S, ledger=Ledger(os.dup(descriptor))).open
    finally:
        os.close(descriptor)


async def outlasting(breaker: CircuitBreaker, *, down_s: float, wanted: bool = True) -> int:
    """How often something is tried that fails while the store is down for a while."""
    retrying = Retrying(deadline_s=DEADLINE_S, on_failure=None, breaker=breaker)
    up_at, tried = trio.current_time() + down_s, 0

    async def ask() -> None:
        if trio.current_time() < up_at:
            raise TransientStoreError("503")

    async def attempt() -> None:
        nonlocal tried
        tried += 1
        await retrying.call("a", ask)

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.run, ask)
        try:
            await breaker.outlast(attempt, wanted=lambda: wanted)
        finally:
            nursery.cancel_scope.cancel()
    assert trio.current_time() - up_at < 3 * PROBE_INTERVAL_S + LONGEST_WAIT_S
    return tried


@pytest.mark.parametrize(("down_s", "tried"), [(0, 1), (DEADLINE_S - 1, 1), (DEADLINE_S + 1, 2), (3600, 2)])
async def test_an_outage_is_outlasted_however_long_it_is(
    breaker: CircuitBreaker, down_s: float, tried: int, autojump_clock: MockClock
) -> None:
    assert await outlasting(breaker, down_s=down_s) == tried


async def test_what_nobody_wants_after_an_outage_is_not_tried_again(
    breaker: CircuitBreaker, autojump_clock: MockClock
) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(StoreUnavailableError, match="503")):
        await outlasting(breaker, down_s=100, wanted=False)


async def test_what_fails_alone_is_given_up(breaker: CircuitBreaker, autojump_clock: MockClock) -> None:
    tried = 0

    async def attempt() -> None:
        nonlocal tried
        tried += 1
        breaker.failed(TransientStoreError("500"), trio.current_time())
        breaker.answered()
        raise StoreUnavailableError("500")

    with pytest.raises(StoreUnavailableError, match="500"):
        await breaker.outlast(attempt)
    assert tried == ATTEMPTS


async def test_a_defect_of_a_probe_is_logged_and_ends_nothing_else(
    breaker: CircuitBreaker, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def probe() -> None:
        raise ZeroDivisionError

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.run, probe)
        await fail(breaker, for_s=1)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"]
