"""Which bodies of members lag behind those of others."""

import time

import pytest

from trimsfs.extras.fleet.pace import JUDGED_AFTER_S, LASTS_S, Body, Pace

MIB = 1 << 20
LENGTH = 8 * MIB


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def comes(pace: Pace, clock: Clock, member: str, took_s: float) -> None:
    """A whole body."""
    with pace.body(member, LENGTH) as body:
        clock.now += took_s
        body.received = LENGTH


def lags(pace: Pace, body: Body, received: int, lag: float = 3.0) -> bool:
    body.received = received
    return pace.lags(body, lag)


def test_a_body_lags_if_another_member_would_send_all_of_it_sooner(clock: Clock) -> None:
    pace = Pace()
    comes(pace, clock, "a:1", 2.0)
    with pace.body("b:1", LENGTH) as body:
        clock.now += JUDGED_AFTER_S / 2
        assert not lags(pace, body, 1)  # it has just begun
        clock.now += 3.0 - JUDGED_AFTER_S / 2
        assert lags(pace, body, MIB)  # 21 s more
        assert not lags(pace, body, MIB, lag=12.0)
        assert not lags(pace, body, 3 * MIB)  # 5 s more


def test_a_member_is_not_compared_with_itself_or_with_what_was_long_ago(clock: Clock) -> None:
    pace = Pace()
    comes(pace, clock, "a:1", 1.0)
    comes(pace, clock, "b:1", 1.0)
    clock.now += LASTS_S
    comes(pace, clock, "b:1", 1.0)
    with pace.body("b:1", LENGTH) as body:
        clock.now += JUDGED_AFTER_S
        assert not lags(pace, body, 1)


def test_bodies_that_are_still_coming_tell_how_fast_others_are(clock: Clock) -> None:
    pace = Pace()
    with pace.body("a:1", LENGTH) as other, pace.body("b:1", LENGTH) as body:
        clock.now += JUDGED_AFTER_S
        other.received = 4 * MIB
        assert lags(pace, body, MIB // 2)
        other.received = MIB
        assert not lags(pace, body, MIB // 2)
