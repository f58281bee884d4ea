"""Worker threads for calls that block on the disk."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

from trimsfs.concurrency.in_thread import in_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Threads:
    """Runs functions in at most *count* threads at a time."""

    def __init__(self, count: int) -> None:
        self._limiter = trio.CapacityLimiter(count)

    async def ask(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Run a *function* without side effects; a cancelled caller abandons it."""
        return await in_thread(function, *arguments, limiter=self._limiter, abandon_on_cancel=True)

    async def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Run *function* to its end, even if the caller is cancelled: callers count what it did."""
        with trio.CancelScope(shield=True):
            return await in_thread(function, *arguments, limiter=self._limiter)
        raise AssertionError("unreachable: a shield swallows nothing")
