"""Failed reads: the log names each program whose file cannot be completed, as SIGBUS gives no reason."""

import errno
import logging
import os

import trio

from trimsfs.fuse.errnos import errno_of
from trimsfs.fuse.waiters import status_of

log = logging.getLogger(__name__)

LOGGED_AGAIN_AFTER_S = 5.0


class FailedReads:
    """Logs a line for each program and file, and repeats it after LOGGED_AGAIN_AFTER_S at the earliest."""

    def __init__(self) -> None:
        self._logged_at: dict[tuple[int, str], float] = {}

    def tell(self, thread: int, path: str, error: Exception) -> None:
        """Log that a read for a thread failed. The kernel does not tell whether the file is read or mapped."""
        process, name = _program(thread)
        now = trio.current_time()
        self._logged_at = {one: at for one, at in self._logged_at.items() if now < at + LOGGED_AGAIN_AFTER_S}
        if (process, path) in self._logged_at:
            return
        self._logged_at[process, path] = now
        number = errno_of(error)
        log.warning(
            "%s: %s: the file cannot be completed: %s: %s (a read fails with %s, a mapping with SIGBUS)",
            f"pid {process} ({name})" if process else "a process of another PID namespace",
            path,
            os.strerror(number),
            error,
            errno.errorcode[number],
        )


def _program(thread: int) -> tuple[int, str]:
    """The process id and the name of a thread, as far as ``/proc`` tells."""
    try:
        status = status_of(thread)
    except OSError:
        return thread, "?"
    return int(status.get("Tgid", thread)), status.get("Name", "?")
