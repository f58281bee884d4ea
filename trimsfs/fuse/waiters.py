"""Threads that wait for an answer: one that is killed cannot go before it has it, so it is given one.

The kernel lets a signal end a wait only until the server has taken the request. It does tell of signals, but of those
that a program goes on after as well, which expects no error of a lookup; and not a second time, nor another server.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

CHECK_INTERVAL_S = 0.5
_SIGKILL = 1 << 8


class Waiters:
    """Looks after requests that have been under way for a while."""

    def __init__(self) -> None:
        self._waiting: dict[trio.CancelScope, int] = {}
        self._any = trio.Event()

    @contextmanager
    def waiting(self, thread: int) -> Iterator[None]:
        """A request of a thread, ended with InterruptedError once that is killed.

        One of another PID namespace has no number, and waits.
        """
        if thread == 0:
            yield
            return
        with trio.CancelScope() as scope:
            self._waiting[scope] = thread
            self._any.set()
            try:
                yield
            finally:
                del self._waiting[scope]
        if scope.cancelled_caught:
            raise InterruptedError

    async def run(self) -> None:
        """End requests whose threads are killed, for as long as the server runs."""
        while True:
            await self._any.wait()
            before = set(self._waiting)
            await trio.sleep(CHECK_INTERVAL_S)
            for scope in before & self._waiting.keys():
                if _killed(self._waiting[scope]):
                    scope.cancel()
            if not self._waiting:
                self._any = trio.Event()


def _exists(thread: int) -> bool:
    try:
        os.kill(thread, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _killed(thread: int) -> bool:
    """Whether a thread is to end as soon as it can: whatever kills it, SIGKILL is pending then."""
    try:
        status = Path(f"/proc/{thread}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return not _exists(thread)  # it may be another user's, where /proc hides those
    except OSError:
        return False  # not told
    pending = next((line for line in status.splitlines() if line.startswith(b"SigPnd:")), b"SigPnd: 0")
    return bool(int(pending.split()[1], 16) & _SIGKILL)
