"""When the next server may start, and when none any more."""

import time

import pytest

from mountctl.keeper.servers import restart_policy
from mountctl.keeper.servers.restart_policy import RestartPolicy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, which stands still unless it is set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "clock_gettime", lambda _: now[0])
    return now


def test_servers_that_have_worked_are_followed_at_once_for_ever(clock: list[float]) -> None:
    found = RestartPolicy()
    for _ in range(100):
        found.ended("killed", clock[0])
        clock[0] += restart_policy.STABLE_S
        found.ended("killed", clock[0] - restart_policy.STABLE_S)
        assert (found.delay_s, found.exhausted) == (0, False)
    assert (found.restarts, found.last_end) == (200, "killed")


def test_those_that_end_at_once_are_followed_later_and_later_and_then_not(clock: list[float]) -> None:
    found, delays = RestartPolicy(), []
    while not found.exhausted:
        found.ended("exit code 1", None)
        delays.append(round(found.delay_s, 3))
        clock[0] += found.delay_s
    assert delays == [0, 0, 0.1, 0.2, 0.4, 0.8]


def test_a_standby_that_does_not_come_is_no_reason_to_give_up_while_one_serves(clock: list[float]) -> None:
    found = RestartPolicy()
    for _ in range(20):
        found.standby_failed("exit code 2", alone=False)
    assert (found.exhausted, found.delay_s, found.last_end) == (False, restart_policy.BACKOFF_LIMIT_S, None)
    found.reset_delay()
    assert found.delay_s == 0
    found.standby_promoted()
    found.standby_failed("exit code 2", alone=True)
    assert (round(found.delay_s, 3), found.last_end) == (restart_policy.BACKOFF_S, "exit code 2")


def test_one_that_made_way_has_not_failed(clock: list[float]) -> None:
    found = RestartPolicy()
    for _ in range(20):
        found.replaced()
    assert (found.restarts, found.exhausted, found.delay_s, found.last_end) == (20, False, 0, None)


def test_the_age_of_an_end_does_not_change_with_the_clock(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a host without a battery, whose clock starts in 1970 until it is set by NTP."""
    found = RestartPolicy()
    monkeypatch.setattr(time, "time", lambda: 100.0)
    found.ended("killed", clock[0])
    clock[0] += 7
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    assert found.facts()["last_end_at"] == 1.8e9 - 7
