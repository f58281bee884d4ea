"""Killed threads that wait for an answer: the kernel keeps each until it has one, so the server ends its request.

A signal ends a wait by itself only until the server has read the request. FUSE_INTERRUPT is no help: it comes for every
signal, also for those after which a program goes on and expects no error of a lookup, only once, and to one server.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

CHECK_INTERVAL_S = 0.5
_SIGKILL = 1 << 8


class Waiters:
    """Looks from time to time whether the threads are killed whose requests are under way."""

    def __init__(self) -> None:
        self._waiting: dict[trio.CancelScope, int] = {}
        self._any = trio.Event()

    @contextmanager
    def waiting(self, thread: int) -> Iterator[None]:
        """The length of a request: ended with InterruptedError once its thread is killed.

        A thread of another PID namespace has the number 0: its request goes on.
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
    """Whether a thread ends as soon as it can: whatever kills it, SIGKILL is pending then."""
    try:
        status = Path(f"/proc/{thread}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return not _exists(thread)  # /proc may hide it, as another user's
    except OSError:
        return False  # unknown
    pending = next((line for line in status.splitlines() if line.startswith(b"SigPnd:")), b"SigPnd: 0")
    return bool(int(pending.split()[1], 16) & _SIGKILL)
