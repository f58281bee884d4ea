"""Calls in threads that are abandoned when they stall, whatever the thread waits for, as a network file system."""

import time
from collections.abc import Callable
from typing import TypeVar

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import StoreStalledError
from trimsfs.stores.base import Sink
from trimsfs.types import Buffer

T = TypeVar("T")

STALL_S = 20.0
"""How long a call may take, or a read bring nothing. A disk that sleeps takes seconds to start, and a keeper waits 30 s
for a server."""
_REPORT_INTERVAL_S = 1.0
"""Least seconds between two signs of progress that a thread gives."""


class StallGuard:
    """Makes a call in a thread, and abandons it after *stall_s* seconds without progress: STALL_S without one.

    The error says that *missing* has not come.
    """

    def __init__(self, stall_s: float | None = None, *, missing: str = "answer") -> None:
        self._stall_s = STALL_S if stall_s is None else stall_s
        self._missing = missing
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()

    async def call(self, function: Callable[[], T], limiter: trio.CapacityLimiter, subject: object) -> T:
        """Return what *function* does. Raises StoreStalledError, which names the *subject*."""
        self._go_on()
        with self._scope:
            return await in_thread(function, limiter=limiter, abandon_on_cancel=True)
        raise StoreStalledError(f"{subject}: no {self._missing} in {self._stall_s:.3g} s")

    def watching(self, sink: Sink) -> Sink:
        """A sink for the thread: each piece is progress."""
        last_report = time.monotonic()

        def watched(piece: Buffer) -> None:
            nonlocal last_report
            if time.monotonic() - last_report > _REPORT_INTERVAL_S:
                last_report = time.monotonic()
                self.progress()
            sink(piece)

        return watched

    def progress(self) -> None:
        """Tell, from the thread, that the call gets on."""
        self._token.run_sync_soon(self._go_on)

    def _go_on(self) -> None:
        self._scope.deadline = trio.current_time() + self._stall_s
