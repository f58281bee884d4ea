"""The processes that a fork server deals with: callers, their forks, and what this process itself is once it is one."""

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from trimsfs.extras.spawn.fork_server.joining import PEER_PIDFD, Peer, RefusedError
from trimsfs.extras.spawn.fork_server.preloading import imported_since
from trimsfs.extras.spawn.messages import MOST_BYTES, Receiver, peer, raised, send

Message = dict[str, Any]
ORDER_S = 10.0
"""So long a fork waits for its caller's order."""
MOST_TO_SERVER = 4096
"""Bytes of the longest message that a server reads itself."""


class Program:
    """What this process is to run, once it is a fork: the *order* of its caller, and how to tell what it imported."""

    def __init__(self, order: Message, channel: socket.socket, known: set[str] | None) -> None:
        self.order = order
        self._channel = channel
        self._known = known
        self._pid = os.getpid()
        self._inode = os.fstat(channel.fileno()).st_ino
        if known is None:
            channel.close()

    def tell_imports(self) -> None:
        """Tell the server what the program imported, if it learns that.

        What the program has forked ends here, too, perhaps at the same time, and tells nothing.
        """
        if self._known is None or os.getpid() != self._pid:
            return
        with suppress(OSError):  # the server has ended, or the program has closed all descriptors
            if os.fstat(self._channel.fileno()).st_ino == self._inode:
                send(self._channel, {"is": "imported", "modules": imported_since(self._known, self.order["directory"])})
        self._channel.detach()  # the number may be that of a file of the program by now


class Caller:
    """A process that asks: its connection, and the program that was forked for it."""

    def __init__(self, connection: socket.socket, first: int) -> None:
        self.connection = connection
        self.receiver = Receiver(connection, first, most_bytes=MOST_TO_SERVER)
        self.fork: Fork | None = None
        self.is_read_by_fork = False
        self._is_stopped = False
        self._is_roused = False

    def order(self) -> tuple[Message, list[int]]:
        """In its fork: wait for its order, and the descriptors beside it. Raises EOFError, OSError and ValueError."""
        self.receiver.most_bytes = MOST_BYTES
        self.receiver.takes_descriptors = True
        arrives = select.poll()
        arrives.register(self.connection, select.POLLIN)
        give_up_at = time.monotonic() + ORDER_S
        while (whole := self.receiver.message()) is None:
            if not arrives.poll(1000 * max(0.0, give_up_at - time.monotonic())):
                raise EOFError
            with suppress(BlockingIOError):
                self.receiver.read(socket.MSG_DONTWAIT)
        return whole

    def stop(self) -> None:
        """Its program has stopped, so it stops. It is not told that: it might read it after it was to go on."""
        self._is_stopped = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Its program goes on, or has ended: so does it, unless it was the first to do so."""
        if self._is_stopped:
            self._is_stopped, self._is_roused = False, True
            self._signal(signal.SIGCONT)

    def passes_on(self, number: int) -> bool:
        """Whether a signal that it tells of is meant for its program, and is not the one that roused it."""
        if number != signal.SIGCONT:
            return True
        was_roused, self._is_roused = self._is_roused, False
        if not was_roused:
            self._is_stopped = False  # else it may have been stopped again since it was roused
        return not was_roused

    def _signal(self, number: int) -> None:
        with suppress(OSError):  # it has ended
            try:
                pidfd = self.connection.getsockopt(socket.SOL_SOCKET, PEER_PIDFD)
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:
                    raise
                os.kill(peer(self.connection)[0], number)  # of this namespace, as it is with such a kernel
            else:
                try:
                    signal.pidfd_send_signal(pidfd, number)
                finally:
                    os.close(pidfd)

    def tell(self, message: Message) -> None:
        tell(self.connection, message)


class Fork:
    """A program: its process, and the channel to it."""

    def __init__(self, pid: int, channel: socket.socket, caller: Caller, peer: Peer | None) -> None:
        self.pid = pid
        self.channel = channel
        self.receiver = Receiver(channel)
        self.caller = caller
        self.peer = peer
        self.may_run = False
        """Whether it is what its caller is, and waits for the caller's word."""
        self.has_begun = False

    def is_now(self, pid: int) -> None:
        """It is another process from now on, a child of this one, as its parent ends. Raises ValueError if not."""
        if self.peer is None or not self.peer.enters_pid_namespace:
            raise ValueError("a fork that is in its namespaces already is no other process")
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)  # the kernel kills a program whose parent ends later
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            parent = file.read().rpartition(")")[2].split()[1]
        if int(parent) != os.getpid():
            raise ValueError(f"pid {pid} is not the fork's")
        self.pid = pid

    def joined(self) -> str | None:
        """Put it where its caller is, as far as only the server can; why it must not run, or None."""
        if self.peer is None:
            return None
        self.peer.place(self.pid)
        return self.peer.difference(self.pid)

    def close(self) -> None:
        """Hear it no more."""
        self.receiver.close()
        if self.peer is not None:
            self.peer.close()


def raised_socket(end: socket.socket, first: int) -> socket.socket:
    return socket.socket(fileno=raised(end.detach(), first))


def refusal(error: OSError) -> Message:
    return {"is": "refused", "why": f"the fork server cannot fork: {error.strerror or error}"}


def check_numbers(wanted: Sequence[int], descriptors: Sequence[int]) -> None:
    """See that this process has no descriptor of a *wanted* number but those it was sent. Raises RefusedError."""
    if taken := [number for number in set(wanted) - set(descriptors) - {0, 1, 2} if _is_open(number)]:
        raise RefusedError(f"its descriptor {min(taken)} is one that the fork server has")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def tell(channel: socket.socket, message: Message) -> None:
    with suppress(OSError):  # it has ended
        send(channel, message)


def signal_process(pid: int, number: int, *, group: bool) -> None:
    with suppress(OSError):  # it has ended, or is no longer this user's
        (os.killpg if group else os.kill)(pid, number)


def refuse(channel: socket.socket, why: str) -> None:
    tell(channel, {"is": "refused", "why": why})
    os._exit(1)
