"""Helper processes: those that the server forks at its start, and cannot do without."""

import os
import signal
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import trio

from trimsfs.concurrency.channel import pair
from trimsfs.errors import StoreUnavailableError
from trimsfs.processes import LOOK_INTERVAL_S, StopWatch, fork_patiently, stopped
from trimsfs.text import set_process_title


@dataclass(frozen=True, slots=True)
class HelperProcess:
    """The server's side of a helper process: its pid, and this end of a pair of sockets, of which it has the other."""

    name: str
    pid: int
    socket: socket.socket

    async def watch(self) -> NoReturn:
        """Raises StoreUnavailableError once the process has ended or is stopped: the next server forks another one.

        A process that is stopped from the outset has been so under the server before.
        """
        watch = StopWatch()
        is_stopped = stopped(self.pid)
        while not is_stopped:
            with trio.move_on_after(LOOK_INTERVAL_S):
                await trio.lowlevel.wait_readable(self.socket)
                raise StoreUnavailableError(f"the {self.name} has ended: starting another server")
            is_stopped = watch.stays_stopped(self.pid)
        raise StoreUnavailableError(f"the {self.name}, pid {self.pid}, is stopped: starting another server")


def fork_helper(
    name: str, work: Callable[[socket.socket], None], *, mountpoint: Path, not_for_it: Iterable[int] = ()
) -> HelperProcess:
    """Fork a process that does *work* with its end of the sockets, without the descriptors *not_for_it*.

    Call it while the server has neither threads nor other descriptors to leak. *mountpoint* is what ``ps`` shows that
    the process works for. Its work should end once the server's end of the sockets is closed.
    """
    ours, theirs = pair()
    pid = fork_patiently()
    if pid == 0:
        status = 1
        try:
            ours.close()
            for descriptor in not_for_it:
                os.close(descriptor)
            set_process_title(name, mountpoint)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the server, which ends its helpers
            work(theirs)
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    return HelperProcess(name, pid, ours)
