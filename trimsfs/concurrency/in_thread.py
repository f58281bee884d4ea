"""Calls that block, each in a thread of trio's: with patience while the system has no room for another thread."""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

from trimsfs.errors import NoThreadError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE_S, PAUSE_S = 30.0, 0.1
"""How long to try to start a thread, and the pause after a failure: other processes may have taken all that is left."""
_NO_ROOM = "can't start new thread"


async def in_thread(
    function: Callable[[*Ts], T],
    *arguments: *Ts,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """As `trio.to_thread.run_sync`. Raises NoThreadError if no thread can be started for PATIENCE_S."""
    give_up_at = trio.current_time() + PATIENCE_S
    while True:
        try:
            return await trio.to_thread.run_sync(
                function, *arguments, abandon_on_cancel=abandon_on_cancel, limiter=limiter
            )
        except RuntimeError as error:
            if str(error) != _NO_ROOM:
                raise
            if trio.current_time() >= give_up_at:
                raise NoThreadError("no thread can be started: raise pids.max, or RLIMIT_NPROC") from error
        await trio.sleep(PAUSE_S)
