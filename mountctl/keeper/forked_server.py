"""Servers that a server has forked, and processes that are no children of the keeper, or not yet.

A server that the keeper has started forks another one when it is promoted, before it reads anything from a network or
answers anybody. That one stands by: it has all loaded, in memory that it shares with the first.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mountctl.keeper.server_process import ServerProcess

_SO_PASSPIDFD = 76
"""Of Linux 6.5: with a message comes a pidfd of its sender."""
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)


class OtherProcess:
    """A process by its pidfd, for a `ServerProcess`. Raises OSError."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd
        facts = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        self._pid = int(facts.partition("\nPid:\t")[2].split("\n")[0])
        self.returncode: int | Any = None

    @property
    def pid(self) -> int:
        return self._pid

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            try:
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self._pid, os.WNOHANG)[1])
            except ChildProcessError:
                self.returncode = -signal.SIGKILL  # how it has ended, only its parent is told
        found: int | None = self.returncode
        return found

    def kill(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def terminate(self) -> None:
        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self._pid), timeout or 0.0)
        return self.poll() or 0

    def descriptor(self, number: int) -> int:
        """A close-on-exec descriptor for what the process has open under a number."""
        found = int(_libc.syscall(_PIDFD_GETFD, self._pidfd, number, 0))
        if found < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return found


class _NotYetKnown:
    """The process at the other end of a channel before its first message."""

    pid = 0

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.returncode: int | Any = None

    def poll(self) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._channel, 0)
            if poll.poll(0):
                self.kill()  # nobody is there
        found: int | None = self.returncode
        return found

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL  # the channel is closed then

    terminate = kill

    def wait(self, timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("", timeout or 0.0)


class ForkedServer(ServerProcess):
    """A server that another one forks, and gives *their_end* of a channel.

    Raises OSError where the kernel cannot tell who has sent a message.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        ours, self.their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 1)
        self._begin(order, ours)
        self._process, self._in_idle_time = _NotYetKnown(ours), False

    def ended(self) -> bool:
        return super().ended() if self.pid else self.reaped()

    def _sent_by(self, pidfd: int) -> None:
        if self.pid:
            os.close(pidfd)
        else:
            self._process = OtherProcess(pidfd)
            self.channel.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 0)


def forked_by(server: ServerProcess) -> tuple[ForkedServer | None, socket.socket | None]:
    """What a server is to fork, and its end of the channel; none if it forks nothing, or this kernel cannot tell who it
    is."""
    try:
        forked = ForkedServer(server.order) if server.forks else None
    except OSError:
        forked = None
    return forked, None if forked is None else forked.their_end


def adopt_orphans() -> None:
    """Be the parent of what servers leave behind when they end: of the server that follows, above all."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(servers: Collection[ServerProcess]) -> None:
    """Collect the exit codes of children that have ended, but for those of *servers*, which these collect."""
    adopts = ctypes.c_int()
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(adopts), 0, 0, 0)
    if not adopts.value:
        return  # all children are known
    known = {server.pid for server in servers}
    with contextlib.suppress(ChildProcessError):  # there is none
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in known:
            os.waitpid(ended.si_pid, os.WNOHANG)
