"""What a keeper keeps of GPU copies, so that it outlives the servers: descriptors, and the socket of their clients.

A copy in GPU memory lasts as long as somebody has a descriptor of it. Servers hand theirs over by number; the next one
has them back. They end with the keeper: one that goes on after another was killed has none, and the server that
recalls them is told so. A service manager could keep them as well, but if it missed that one was let go, that memory
of the GPU would be nobody's until the mount ends.

The socket is the keeper's because a server may not write where it is, and so that who connects while there is no
server waits for the next. Who may have what is the server's to decide. A service manager keeps it: containers have the
socket itself, not its name.
"""

import errno
import fcntl
import os
import resource
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mountctl.keeper import protocol
from mountctl.linux.sd_notify import Notifier
from mountctl.linux.sockets import ListenError, Place, gpu_path, listen_at

HELD_LIMIT = 512
BACKLOG = 128
LISTENER = "gpu-listener"
"""The name by which a service manager has the socket."""
_FUSE_DEVICE = os.makedev(10, 229)


class Kept:
    """The numbered descriptors of one mount, and its socket: an earlier keeper's, if that has been stored."""

    def __init__(self, mountpoint: Path, notifier: Notifier, stored: Mapping[str, int]) -> None:
        self._mountpoint = mountpoint
        self._notifier = notifier
        self._storing = False
        self._held: dict[int, int] = {}
        self._listener: socket.socket | None = None
        self._place: Place | None = None
        if LISTENER in stored:
            self._go_on(socket.socket(fileno=stored[LISTENER]))

    def answer(
        self,
        message: protocol.Hold | protocol.LetGo | protocol.Recall | protocol.Listen,
        descriptors: list[int],
        send: Callable[[dict[str, Any], list[int]], None],
    ) -> None:
        """Do what a server asks for, and tell it. A descriptor that is kept is taken out of those that have come."""
        match message:
            case protocol.Hold(number):
                send(self._hold(number, descriptors), [])
            case protocol.LetGo(number):
                self._let_go(number)
            case protocol.Recall(number) if number in self._held:
                send({}, [self._held[number]])
            case protocol.Recall(number):
                send({"error": f"number {number} is not held"}, [])
            case protocol.Listen():
                send(*self._listen())

    def _hold(self, number: int, descriptors: list[int]) -> dict[str, Any]:
        if number in self._held:  # it is not replaced: the server may still count on what there is
            return {"error": f"number {number} is held already"}
        if len(self._held) >= _room():
            return {"error": f"{len(self._held)} descriptors are held already"}
        if not descriptors:  # the kernel drops a descriptor that there is no room for
            return {"error": os.strerror(errno.EMFILE)}
        if not _harmless(descriptors[0]):
            return {"error": "neither a device nor a pipe"}
        self._held[number] = descriptors.pop(0)
        return {}

    def _let_go(self, number: int) -> None:
        descriptor = self._held.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)

    def _listen(self) -> tuple[dict[str, Any], list[int]]:
        if self._listener is None:
            path = gpu_path(self._mountpoint)
            try:
                self._listener = listen_at(path, socket.SOCK_SEQPACKET, mode=0o666, backlog=BACKLOG)
            except ListenError as error:
                return {"error": str(error)}, []
            self._place = Place(self._listener)
            self._store()
        return {"path": self._listener.getsockname()}, [self._listener.fileno()]

    def store(self) -> None:
        """Have the service manager keep the socket, as soon as there is one."""
        if not self._storing:
            self._storing = True
            self._store()

    def _store(self) -> None:
        if self._storing and self._listener is not None:
            self._notifier.store({LISTENER: self._listener.fileno()})

    def close(self) -> None:
        """Let go of everything, for good."""
        for number in list(self._held):
            self._let_go(number)
        if self._listener is not None and self._place is not None:
            self._notifier.unstore((LISTENER,))
            self._place.remove()
            self._listener.close()
            self._listener = None

    def _go_on(self, listener: socket.socket) -> None:
        if os.path.exists(listener.getsockname()):
            self._listener, self._place = listener, Place(listener)
        else:  # nobody can connect
            self._notifier.unstore((LISTENER,))
            listener.close()


def _room() -> int:
    """How many may be held: what else a keeper opens, to replace a server above all, is to find room as well."""
    return min(HELD_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _harmless(descriptor: int) -> bool:
    """Whether to keep a descriptor open can do no more than keep memory: a device's, as CUDA's are, or a pipe's.

    A file or directory would hold its file system in use, and closing it may wait for a server; a socket would keep a
    channel from ending, and so would another descriptor of the mount's own connection.
    """
    status = os.fstat(descriptor)
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH:
        return False
    return stat.S_ISFIFO(status.st_mode) or (stat.S_ISCHR(status.st_mode) and status.st_rdev != _FUSE_DEVICE)
