"""Servers that another server has forked, and processes that are not, or not yet, children of the keeper.

A server that the keeper has started forks a standby when it is promoted, before it reads anything from a network or
answers anybody. The standby has everything loaded, in memory that it shares with the first server.
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

from mountctl.keeper.servers.server_process import Process, ServerProcess
from trimsfs.polling import readable

_SO_PASSPIDFD = 76
"""Since Linux 6.5: a message comes with a pidfd of its sender."""
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_PIDFD_GETFD = 438
NOT_TOLD = "only its parent knows how"
"""How a server has ended that is no child of the keeper. A launcher logs it."""

_libc = ctypes.CDLL(None, use_errno=True)


class OtherProcess:
    """A process by its pidfd, which is closed once the process has ended, for a `ServerProcess`. Raises OSError."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd
        facts = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        self._pid = int(facts.partition("\nPid:\t")[2].split("\n")[0])
        self.returncode: int | Any = None
        self.collected = False
        """Whether this process, as the parent, got the exit code; else `returncode` tells the end alone."""

    @property
    def pid(self) -> int:
        return self._pid

    def poll(self) -> int | None:
        if self.returncode is None and readable([self._pidfd], 0):
            self.returncode = self._collected()
            os.close(self._pidfd)
        code: int | None = self.returncode
        return code

    @property
    def is_child(self) -> bool:
        """Whether this process gets its exit code, or has got it."""
        if self.returncode is not None:
            return self.collected
        try:
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _collected(self) -> int:
        """The exit code of the process, which has ended, as `subprocess` has it."""
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)  # no pid: it may have none any more
        except ChildProcessError:
            ended = None
        if ended is None:
            return -signal.SIGKILL
        self.collected = True
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not readable([self._pidfd], timeout):
            raise subprocess.TimeoutExpired(str(self._pid), timeout or 0.0)
        return self.poll() or 0

    @property
    def pidfd(self) -> int:
        return self._pidfd

    def descriptor(self, number: int) -> int:
        """A close-on-exec duplicate of the process's descriptor of this number. Raises OSError."""
        duplicate = int(_libc.syscall(_PIDFD_GETFD, self._pidfd, number, 0))
        if duplicate < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return duplicate


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
                self.kill()  # the other end is closed
        code: int | None = self.returncode
        return code

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL  # the fork ends when the keeper closes the channel

    terminate = kill

    def wait(self, timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("", timeout or 0.0)


class ForkedServer(ServerProcess):
    """A server that another one forks; the fork gets *their_end* of the channel.

    Raises OSError if the kernel does not identify the sender of a message (before Linux 6.5).
    """

    def __init__(self, order: dict[str, Any]) -> None:
        ours, self.their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 1)
        self._begin(order, ours)
        self._process: Process = _NotYetKnown(ours)
        self._in_idle_time = False

    def ended(self) -> bool:
        return super().ended() if self.pid else self.reaped()

    @property
    def pidfd(self) -> int:
        assert isinstance(self._process, OtherProcess)
        return self._process.pidfd

    def end_reason(self) -> str:
        reason = super().end_reason()
        # A large server that was killed may take seconds to end: then it has no exit code yet.
        return reason if isinstance(self._process, OtherProcess) and self._process.is_child else NOT_TOLD

    def _sent_by(self, pidfd: int) -> None:
        if self.pid:
            os.close(pidfd)
        else:
            self._process = OtherProcess(pidfd)
            self.channel.setsockopt(socket.SOL_SOCKET, _SO_PASSPIDFD, 0)


def forked_by(server: ServerProcess) -> tuple[ForkedServer | None, socket.socket | None]:
    """The server that *server* is to fork, and the fork's end of the channel; None for both if it cannot fork one."""
    try:
        forked = ForkedServer(server.order) if server.forks else None
    except OSError:
        forked = None
    return forked, None if forked is None else forked.their_end


def adopt_orphans() -> None:
    """Become the parent of the processes that servers leave behind when they end, above all of the standby."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(servers: Collection[ServerProcess]) -> list[int]:
    """Collect the exit codes of children that have ended, except *servers*, which collect their own.

    Returns the orphans that run on.
    """
    adopts = ctypes.c_int()
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(adopts), 0, 0, 0)
    if not adopts.value:
        return []  # without orphans, all children are servers
    known = {server.pid for server in servers}
    with contextlib.suppress(ChildProcessError):  # there is none
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in known:
            os.waitpid(ended.si_pid, os.WNOHANG)
    with contextlib.suppress(OSError):  # a kernel that does not list children
        children = map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        return [child for child in children if child not in known]
    return []
