"""Waiters: the server ends the requests of killed threads, which otherwise live until the kernel has the answer.

A signal ends a wait only until the server has read the request; for a readahead, the kernel reports no signal at all.
FUSE_INTERRUPT does not help. It comes for every signal, also if the program goes on and expects no error from a lookup
or read. And it comes once, to one server. So the server itself looks for killed threads, and for SIGINT and SIGQUIT,
the signals of the keyboard. A program that handles one of these gets EINTR.

An open that waits also ends for other signals that the program handles (`signalled`). FUSE_INTERRUPT tells when to look
for one: now and every CHECK_INTERVAL_S. It also comes when a debugger or a freezer stops the thread, or io_uring has
news for it. It does not come again for a signal after that.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from trimsfs.processes import exists

CHECK_INTERVAL_S = 0.25
ENDING = (signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class _Wait:
    """A request under way: its thread, when it came, and the path that it is about, if it is one in the store."""

    thread: int
    since: float
    path: Callable[[], str | None]


class Waiters:
    """Checks every CHECK_INTERVAL_S whether threads with requests in flight should end; and calls *look* then."""

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        self._look = look
        self._under_way = 0
        self._waiting: dict[trio.CancelScope, _Wait] = {}
        self._any = trio.Event()

    @contextmanager
    def waiting(self, thread: int, path: Callable[[], str | None] = lambda: None) -> Iterator[None]:
        """A block for a request: ends with InterruptedError once its thread is killed, or a signal should end it.

        Thread 0 is in another PID namespace: its request goes on.
        """
        self._under_way += 1
        try:
            if thread == 0:
                yield
                return
            with trio.CancelScope() as scope:
                self._waiting[scope] = _Wait(thread, trio.current_time(), path)
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
        """Whether no request is in flight."""
        return self._under_way == 0

    def waits(self) -> list[dict[str, object]]:
        """Which ``thread`` waits for which ``path`` of the store, and for how many ``seconds``. Of several requests,
        such as those of a readahead, the first counts."""
        since: dict[tuple[int, str], float] = {}
        for wait in self._waiting.values():
            path = wait.path()
            if path is not None:
                first = since.setdefault((wait.thread, path), wait.since)
                since[wait.thread, path] = min(first, wait.since)
        now = trio.current_time()
        return [{"thread": thread, "path": path, "seconds": now - began} for (thread, path), began in since.items()]

    async def run(self) -> None:
        """End the requests of such threads until the server stops."""
        while True:
            await self._any.wait()
            before = set(self._waiting)
            await trio.sleep(CHECK_INTERVAL_S)
            self._look()
            waiting = before & self._waiting.keys()
            ended = {thread for thread in {self._waiting[scope].thread for scope in waiting} if _ended(thread)}
            for scope in waiting:
                if self._waiting[scope].thread in ended:
                    scope.cancel()
            if not self._waiting:
                self._any = trio.Event()


def status_of(thread: int) -> Mapping[str, str]:
    """The fields of a thread's status in ``/proc``, by name. Raises OSError."""
    lines = Path(f"/proc/{thread}/status").read_bytes().decode(errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _ended(thread: int) -> bool:
    """Whether a thread is being killed (SIGKILL is then pending, whatever the cause), has ended, or should end."""
    try:
        status = status_of(thread)
    except (FileNotFoundError, ProcessLookupError):
        return not exists(thread)  # /proc may hide threads of other users
    except OSError:
        return False  # not known
    pending = _pending(status)
    return bool(pending & _bit(signal.SIGKILL)) or any(pending & _bit(one) for one in ENDING)


def signalled(thread: int) -> bool:
    """Whether a signal awaits a thread that its program handles, or that kills it; if that is not known, it does."""
    try:
        status = status_of(thread)
    except OSError:
        return True
    return bool(_pending(status) & (_signals(status, "SigCgt") | _bit(signal.SIGKILL)))


def _pending(status: Mapping[str, str]) -> int:
    """The signals that await a thread, but for those that it blocks. A kill, whatever its cause, awaits each thread."""
    return (_signals(status, "SigPnd") | _signals(status, "ShdPnd")) & ~_signals(status, "SigBlk")


def _signals(status: Mapping[str, str], field: str) -> int:
    return int(status.get(field, "0"), 16)


def _bit(number: signal.Signals) -> int:
    return 1 << (number - 1)
