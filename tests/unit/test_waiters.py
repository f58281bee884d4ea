"""Threads that wait for an answer and are ended meanwhile."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from trimsfs.fuse.waiters import CHECK_INTERVAL_S, ENDING, Waiters, status_of

HANDLES = "trap : INT QUIT TERM ALRM; kill -STOP $$; sleep 60"


@pytest.fixture
async def waiters(nursery: trio.Nursery) -> AsyncIterator[Waiters]:
    waiters = Waiters()
    nursery.start_soon(waiters.run)
    yield waiters
    nursery.cancel_scope.cancel()


@pytest.fixture
def gone() -> int:
    """The number of a thread that has been killed."""
    with subprocess.Popen(["sleep", "60"]) as process:
        process.kill()
    return process.pid


@pytest.fixture
def stopped() -> Iterator[int]:
    """A process that handles signals as soon as it goes on, as one does that the kernel makes wait."""
    with subprocess.Popen(["sh", "-c", HANDLES]) as process:
        while not status_of(process.pid)["State"].startswith("T"):
            time.sleep(0.001)
        yield process.pid
        process.kill()


async def test_what_a_killed_thread_waits_for_is_given_up(
    waiters: Waiters, gone: int, autojump_clock: MockClock
) -> None:
    for _ in range(3):
        with pytest.raises(InterruptedError), trio.fail_after(3 * CHECK_INTERVAL_S), waiters.waiting(gone):
            await trio.sleep_forever()


@pytest.mark.parametrize("thread", [os.getpid(), 0], ids=["of this process", "unknown"])
async def test_others_wait_for_as_long_as_it_takes(
    waiters: Waiters, gone: int, thread: int, autojump_clock: MockClock
) -> None:
    with pytest.raises(InterruptedError), waiters.waiting(thread), waiters.waiting(gone):
        await trio.sleep_forever()
    with waiters.waiting(thread):
        await trio.sleep(100 * CHECK_INTERVAL_S)


async def test_a_thread_that_proc_hides_is_not_taken_for_killed(
    waiters: Waiters, gone: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """As with hidepid=2, for another user's."""

    def read_bytes(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with waiters.waiting(os.getpid()):
        await trio.sleep(100 * CHECK_INTERVAL_S)
    with pytest.raises(InterruptedError), waiters.waiting(gone):
        await trio.sleep_forever()


async def test_what_is_answered_at_once_is_not_looked_at(
    waiters: Waiters, gone: int, autojump_clock: MockClock
) -> None:
    for _ in range(100):
        with waiters.waiting(gone):
            await trio.sleep(CHECK_INTERVAL_S / 10)


@pytest.mark.parametrize("number", ENDING)
async def test_signals_that_end_programs_end_what_they_wait_for(
    waiters: Waiters, stopped: int, number: signal.Signals, autojump_clock: MockClock
) -> None:
    with waiters.waiting(stopped):
        await trio.sleep(10 * CHECK_INTERVAL_S)
    os.kill(stopped, number)
    with pytest.raises(InterruptedError), trio.fail_after(3 * CHECK_INTERVAL_S), waiters.waiting(stopped):
        await trio.sleep_forever()


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM])
async def test_other_signals_end_nothing(
    waiters: Waiters, stopped: int, number: signal.Signals, autojump_clock: MockClock
) -> None:
    os.kill(stopped, number)
    with waiters.waiting(stopped):
        await trio.sleep(100 * CHECK_INTERVAL_S)


async def test_a_signal_that_is_blocked_ends_nothing(waiters: Waiters, autojump_clock: MockClock) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        with waiters.waiting(threading.get_native_id()):
            await trio.sleep(100 * CHECK_INTERVAL_S)
    finally:
        signal.sigwait([signal.SIGINT])
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def test_no_request_is_under_way_once_all_are_answered() -> None:
    waiters = Waiters()
    for thread in (0, os.getpid()):
        assert waiters.idle()
        with waiters.waiting(thread):
            assert not waiters.idle()
        with pytest.raises(OSError, match="failed"), waiters.waiting(thread):
            raise OSError("failed")
    assert waiters.idle()


async def test_who_waits_is_told_once_for_each_path_and_since_the_first_request(autojump_clock: MockClock) -> None:
    waiters, thread = Waiters(), threading.get_native_id()
    with waiters.waiting(thread, lambda: "model"):
        await trio.sleep(2)
        with (
            waiters.waiting(thread, lambda: "model"),
            waiters.waiting(thread, lambda: "other"),
            waiters.waiting(thread),
        ):
            assert waiters.waits() == [
                {"thread": thread, "path": "model", "seconds": 2},
                {"thread": thread, "path": "other", "seconds": 0},
            ]
    assert waiters.waits() == []
