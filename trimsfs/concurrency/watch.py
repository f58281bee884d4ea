"""Watches a process that the server has forked, and cannot do without."""

import socket
from typing import NoReturn

import trio

from trimsfs.errors import StoreUnavailableError
from trimsfs.processes import LOOK_INTERVAL_S, StopWatch, stopped


async def watched(end: socket.socket, pid: int, name: str) -> NoReturn:
    """Raises StoreUnavailableError once a process has ended, which holds the other *end*, or is stopped for a while.

    A process that is stopped from the outset has been so under the server before.
    """
    watch = StopWatch()
    is_stopped = stopped(pid)
    while not is_stopped:
        with trio.move_on_after(LOOK_INTERVAL_S):
            await trio.lowlevel.wait_readable(end)
            raise StoreUnavailableError(f"the {name} has ended: starting another server")
        is_stopped = watch.stays_stopped(pid)
    raise StoreUnavailableError(f"the {name}, pid {pid}, is stopped: starting another server")
