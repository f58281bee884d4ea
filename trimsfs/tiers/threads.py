"""Worker threads for calls that block on the disk."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Threads:
    """At most *count* threads at a time. `run` ignores cancellation once it has begun, so that counts stay right."""

    def __init__(self, count: int) -> None:
        self._limiter = trio.CapacityLimiter(count)

    async def ask(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """As `run`, for a *function* without side effects: a cancelled caller abandons it."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter, abandon_on_cancel=True)

    async def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """The result of *function*, or what it raises."""
        with trio.CancelScope(shield=True):
            return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)
        raise AssertionError("unreachable: a shield swallows nothing")
