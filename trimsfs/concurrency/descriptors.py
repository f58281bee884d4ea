"""Patience with a process, or a host, that has too many files open: others are closed soon."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")

PATIENCE_S, PAUSE_S = 2.0, 0.02
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


async def patiently(make: Callable[[], T]) -> T:
    """What *make* returns, which opens a file. Tries for PATIENCE_S while too many are open. Raises OSError."""
    give_up_at = trio.current_time() + PATIENCE_S
    while True:
        try:
            return make()
        except OSError as error:
            if error.errno not in _TOO_MANY or trio.current_time() >= give_up_at:
                raise
        await trio.sleep(PAUSE_S)


def patiently_in_thread(make: Callable[[], T]) -> T:
    """As `patiently`, for a thread that may block."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            return make()
        except OSError as error:
            if error.errno not in _TOO_MANY or time.monotonic() >= give_up_at:
                raise
        time.sleep(PAUSE_S)
