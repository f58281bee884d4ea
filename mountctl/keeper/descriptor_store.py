"""The keeper's descriptor store: descriptors of GPU copies, and the socket of GPU clients, which outlive a server.

A copy in GPU memory lasts as long as a process has a descriptor of it. A server stores its descriptors by number, and
the next one fetches them. They end with the keeper: the successor of a killed keeper has none, and tells servers so.
A service manager could store them as well; but if it missed that one was released, that GPU memory would leak until the
unmount.

The keeper owns the socket because a server may not write to its directory. Clients that connect while no server serves
wait for the next one. The server decides who gets which copy. A service manager stores the socket: containers have
bind-mounted the socket itself, and would not see a new one of the same name.
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

from mountctl.keeper.servers import server_messages
from mountctl.linux.sd_notify import Notifier
from mountctl.linux.sockets import BoundPath, ListenError, gpu_path, listen_at

HELD_LIMIT = 512
BACKLOG = 128
LISTENER = "gpu-listener"
"""The name under which a service manager stores the socket."""
FUSE_DEVICE = os.makedev(10, 229)


class DescriptorStore:
    """The numbered descriptors of one mount, and its socket, which comes from an earlier keeper if one was *stored*."""

    def __init__(self, mountpoint: Path, notifier: Notifier, stored: Mapping[str, int]) -> None:
        self._mountpoint = mountpoint
        self._notifier = notifier
        self._storing = False
        self._descriptors: dict[int, int] = {}
        self._listener: socket.socket | None = None
        self._bound_path: BoundPath | None = None
        if LISTENER in stored:
            self._adopt(socket.socket(fileno=stored[LISTENER]))

    def answer(
        self,
        message: server_messages.Hold | server_messages.LetGo | server_messages.Recall | server_messages.Listen,
        descriptors: list[int],
        send: Callable[[dict[str, Any], list[int]], None],
    ) -> None:
        """Handle a message of a server, and answer it. Removes a descriptor that it stores from *descriptors*."""
        match message:
            case server_messages.Hold(number):
                send(self._hold(number, descriptors), [])
            case server_messages.LetGo(number):
                self._let_go(number)
            case server_messages.Recall(number) if number in self._descriptors:
                send({}, [self._descriptors[number]])
            case server_messages.Recall(number):
                send({"error": f"number {number} is not held"}, [])
            case server_messages.Listen():
                send(*self._listen())

    def _hold(self, number: int, descriptors: list[int]) -> dict[str, Any]:
        if number in self._descriptors:  # not replaced: the server may still rely on it
            return {"error": f"number {number} is held already"}
        if len(self._descriptors) >= _room():
            return {"error": f"{len(self._descriptors)} descriptors are held already"}
        if not descriptors:  # the kernel drops a descriptor if this process has no room
            return {"error": os.strerror(errno.EMFILE)}
        if not _harmless(descriptors[0]):
            return {"error": "neither a device nor a pipe"}
        self._descriptors[number] = descriptors.pop(0)
        return {}

    def _let_go(self, number: int) -> None:
        descriptor = self._descriptors.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)

    def _listen(self) -> tuple[dict[str, Any], list[int]]:
        if self._listener is None:
            path = gpu_path(self._mountpoint)
            try:
                self._listener = listen_at(path, socket.SOCK_SEQPACKET, mode=0o666, backlog=BACKLOG)
            except ListenError as error:
                return {"error": str(error)}, []
            self._bound_path = BoundPath(self._listener)
            self._store()
        return {"path": self._listener.getsockname()}, [self._listener.fileno()]

    def listener(self) -> dict[str, int]:
        """The socket by its name, if there is one."""
        return {LISTENER: self._listener.fileno()} if self._listener is not None else {}

    def store(self) -> None:
        """Let the service manager store the socket, as soon as there is one."""
        if not self._storing:
            self._storing = True
            self._store()

    def _store(self) -> None:
        if self._storing and self._listener is not None:
            self._notifier.store({LISTENER: self._listener.fileno()})

    def close(self) -> None:
        """Close all descriptors, and remove the socket."""
        for number in list(self._descriptors):
            self._let_go(number)
        if self._listener is not None and self._bound_path is not None:
            self._notifier.unstore((LISTENER,))
            self._bound_path.remove()
            self._listener.close()
            self._listener = None

    def _adopt(self, listener: socket.socket) -> None:
        if os.path.exists(listener.getsockname()):
            self._listener, self._bound_path = listener, BoundPath(listener)
        else:  # its path is gone, so nobody can connect
            self._notifier.unstore((LISTENER,))
            listener.close()


def _room() -> int:
    """How many descriptors may be stored: the keeper needs some itself, above all to replace a server."""
    return min(HELD_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def _harmless(descriptor: int) -> bool:
    """Whether an open descriptor pins no more than memory: a device, as CUDA's are, or a pipe.

    A file or directory would keep its file system busy, and closing it may wait for a server. A socket would keep its
    channel open, and so would another descriptor of the mount's own connection.
    """
    status = os.fstat(descriptor)
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH:
        return False
    return stat.S_ISFIFO(status.st_mode) or (stat.S_ISCHR(status.st_mode) and status.st_rdev != FUSE_DEVICE)
