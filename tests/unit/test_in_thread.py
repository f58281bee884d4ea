"""Calls in threads, while the system has no room for another thread."""

import threading

import pytest
import trio
from trio.testing import MockClock

from trimsfs.concurrency.in_thread import PATIENCE_S, in_thread
from trimsfs.errors import NoThreadError


def _none_starts(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """The next threads do not start, so many *times*. trio keeps idle ones, and none of these."""
    failed = 0
    start = threading.Thread.start

    def refuses(thread: threading.Thread) -> None:
        nonlocal failed
        failed += 1
        if failed <= times:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr("trio._core._thread_cache.THREAD_CACHE._idle_workers", {})
    monkeypatch.setattr(threading.Thread, "start", refuses)


async def test_a_shortage_passes(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    _none_starts(monkeypatch, 5)
    limiter = trio.CapacityLimiter(1)
    assert await in_thread(lambda number: number + 1, 1, limiter=limiter) == 2
    assert limiter.borrowed_tokens == 0


async def test_a_lasting_shortage_is_an_error(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    began = trio.current_time()
    with monkeypatch.context() as patch:
        _none_starts(patch, float("inf"))
        with pytest.raises(NoThreadError, match=r"raise pids\.max, or RLIMIT_NPROC"):
            await in_thread(print)
    assert PATIENCE_S <= trio.current_time() - began < PATIENCE_S + 1


async def test_errors_of_the_function_are_its_own() -> None:
    def fails() -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await in_thread(fails)
