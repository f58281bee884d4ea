"""Ended threads that wait for an answer: the kernel keeps each until it has one, so the server ends its request.

A signal ends a wait by itself only until the server has read the request, and of a read ahead the kernel tells no
signal at all. FUSE_INTERRUPT is no help: it comes for every signal, also for those after which a program goes on and
expects no error of a lookup or a read, only once, and to one server. So the server looks by itself for threads that are
killed, and for the signals of the keyboard: a program that handles one of these gets EINTR, and goes on as it likes.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio

CHECK_INTERVAL_S = 0.25
ENDING = (signal.SIGINT, signal.SIGQUIT)


class Waiters:
    """Looks from time to time whether the threads are ended whose requests are under way."""

    def __init__(self) -> None:
        self._under_way = 0
        self._waiting: dict[trio.CancelScope, int] = {}
        self._any = trio.Event()

    @contextmanager
    def waiting(self, thread: int) -> Iterator[None]:
        """The length of a request: ended with InterruptedError once its thread is killed, or a signal should end it.

        A thread of another PID namespace has the number 0: its request goes on.
        """
        self._under_way += 1
        try:
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
        finally:
            self._under_way -= 1

    def idle(self) -> bool:
        """Whether no request is under way."""
        return self._under_way == 0

    async def run(self) -> None:
        """End requests whose threads are ended, for as long as the server runs."""
        while True:
            await self._any.wait()
            before = set(self._waiting)
            await trio.sleep(CHECK_INTERVAL_S)
            waiting = before & self._waiting.keys()
            ended = {thread for thread in {self._waiting[scope] for scope in waiting} if _ended(thread)}
            for scope in waiting:
                if self._waiting[scope] in ended:
                    scope.cancel()
            if not self._waiting:
                self._any = trio.Event()


def status_of(thread: int) -> Mapping[str, str]:
    """What ``/proc`` tells of a thread, by the names of lines. Raises OSError."""
    lines = Path(f"/proc/{thread}/status").read_bytes().decode(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _exists(thread: int) -> bool:
    try:
        os.kill(thread, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _ended(thread: int) -> bool:
    """Whether a thread ends as soon as it can, as SIGKILL is pending then whatever kills it, or should end."""
    try:
        status = status_of(thread)
    except (FileNotFoundError, ProcessLookupError):
        return not _exists(thread)  # /proc may hide it, as another user's
    except OSError:
        return False  # unknown
    own, shared, blocked = (int(status.get(name, "0"), 16) for name in ("SigPnd", "ShdPnd", "SigBlk"))
    pending = (own | shared) & ~blocked
    return bool(own & _bit(signal.SIGKILL)) or any(pending & _bit(one) for one in ENDING)


def _bit(number: signal.Signals) -> int:
    return 1 << (number - 1)
