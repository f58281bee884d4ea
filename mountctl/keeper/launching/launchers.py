"""Launchers: processes elsewhere, as in another container, that join a keeper and start servers for it.

They connect to a socket that only root may use. A launcher also keeps copies of what the keeper holds, so that it can
hand them to the next keeper.
"""

import array
import contextlib
import json
import os
import select
import selectors
import signal
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mountctl.keeper.control_socket import KeeperGoneError, titled
from mountctl.keeper.descriptor_store import LISTENER
from mountctl.keeper.servers.forked_server import ForkedServer
from mountctl.linux.sockets import BoundPath, launchers_path, listen_at
from trimsfs import __version__
from trimsfs.errors import NotPermittedError, TakeoverError
from trimsfs.polling import readable
from trimsfs.processes import StopWatch, stopped

PROTOCOL = 1
"""The version of the messages between keeper and launcher. It changes when either cannot do with the other's of before;
additional fields are ignored."""
JOIN_TIMEOUT_S = 5.0
MESSAGE_LIMIT = 16384
SERVER = "server"
"""The name under which a launcher keeps the pidfd of the server that serves."""
KEPT = ("fuse", "ledger", "lock", LISTENER, SERVER)
_CREDENTIALS = struct.Struct("=iII")
_DESCRIPTOR = array.array("i").itemsize


class _RefusedError(Exception):
    """A launcher may not join: the error's class, by name, and one line for its operator."""


class Launcher:
    """A launcher that has joined; *held* are descriptors that it kept from an earlier keeper, by name.

    Its order is that of a keeper, with the options that a keeper needs, and the launcher's number.
    """

    def __init__(self, end: socket.socket, order: dict[str, Any], held: dict[str, int]) -> None:
        self._end = end
        self.order = order
        self.held = held
        self.pid = peer(end)[0]
        self._stop_watch = StopWatch()

    @property
    def gone(self) -> bool:
        """Whether it has ended, or was ended."""
        if self._end.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._end, select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def stays_stopped(self) -> bool:
        """Whether it has been stopped for a while; ask once a tick."""
        return self._stop_watch.stays_stopped(self.pid)

    def start(self, order: dict[str, Any]) -> ForkedServer:
        """Have it start a server. Raises OSError."""
        server = ForkedServer(order)
        try:
            with server.their_end:
                self._send({"do": "start"}, [server.their_end.fileno()])
        except OSError:
            server.channel.close()
            raise
        return server

    def keep(self, descriptors: Mapping[str, int]) -> None:
        """Have it keep copies of these descriptors, in place of earlier ones."""
        with contextlib.suppress(OSError):
            self._send({"do": "keep", "names": list(descriptors)}, list(descriptors.values()))

    def end(self, kind: str, error: str) -> None:
        """Have it end its servers, and itself with the exit code of an error; of none if both are empty."""
        with contextlib.suppress(OSError):
            self._send({"do": "end", "kind": kind, "error": error}, [])
        self.close()

    def close(self) -> None:
        """Close the connection to it, and what it kept from an earlier keeper."""
        self.drop_held()
        self._end.close()

    def drop_held(self) -> None:
        """Close what it kept from an earlier keeper."""
        for descriptor in self.held.values():
            os.close(descriptor)
        self.held = {}

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self._end.sendmsg([json.dumps(message).encode()], rights, socket.MSG_DONTWAIT)


class Launchers:
    """Listens for launchers of a mount. Raises ListenError.

    A selector can watch its `fileno`; call `poll` when it is readable.
    """

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._listener = listen_at(launchers_path(mountpoint), socket.SOCK_SEQPACKET, mode=0o600, backlog=8)
        self._bound_path = BoundPath(self._listener)
        self._selector = selectors.EpollSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._silent: dict[socket.socket, float] = {}
        self._joined: dict[int, Launcher] = {}
        self._waiting: list[Launcher] = []
        self._number = 0
        self._successors: list[socket.socket] = []
        self._stopped = False

    @property
    def leave(self) -> bool:
        """Whether a signal, or another keeper, has told this one to leave the mount."""
        return self._stopped or bool(self._successors)

    def stop(self, *_: object) -> None:
        """Handle a signal to stop, at any time."""
        self._stopped = True

    def fileno(self) -> int:
        """The descriptor that is readable when there is something to `poll`."""
        return self._selector.fileno()

    def poll(self, timeout_s: float = 0) -> None:
        """Let those join who ask for it."""
        for key, _ in self._selector.select(timeout_s):
            key.data()
        for end, since in list(self._silent.items()):
            if time.monotonic() - since > JOIN_TIMEOUT_S:
                self._forget(end)
                end.close()

    def wait(self, grace_s: float) -> Launcher:
        """Wait for a launcher: for *grace_s* after the first, for one that kept the descriptors of a mount.

        Raises SystemExit when this keeper is told to leave.
        """
        first_at = None
        while True:
            self.poll(0.1)
            if self.leave:
                raise SystemExit(0)
            for launcher in [launcher for launcher in self._waiting if launcher.gone]:
                self._waiting.remove(launcher)
                launcher.close()
            if not self._waiting:
                first_at = None
                continue
            first_at = first_at or time.monotonic()
            keeping = [launcher for launcher in self._waiting if launcher.held]
            if keeping or time.monotonic() - first_at >= grace_s:
                chosen = (keeping or self._waiting)[0]
                self._waiting.remove(chosen)
                return chosen

    def take(self) -> Launcher | None:
        """The launcher that has waited longest since it joined, if one waits."""
        while self._waiting:
            launcher = self._waiting.pop(0)
            if not launcher.gone:
                return launcher
            launcher.close()
        return None

    def of(self, order: dict[str, Any]) -> Launcher | None:
        """The launcher that an order came from, if it lives."""
        launcher = self._joined.get(order["launcher"])
        return launcher if launcher is not None and not launcher.gone else None

    def living(self) -> list[Launcher]:
        """The launchers that serve or have served, the latest first."""
        for number, each in list(self._joined.items()):
            if each.gone:
                self._joined.pop(number).close()
        return [each for _, each in sorted(self._joined.items(), reverse=True) if each not in self._waiting]

    def close(self) -> None:
        """Stop listening. Launchers that have joined see that the keeper has ended, and wait for the next."""
        self._bound_path.remove()
        for launcher in self._joined.values():
            launcher.close()
        for end in (self._listener, *self._silent, *self._successors):
            end.close()
        self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            end, _ = self._listener.accept()
            end.setblocking(False)
            try:
                self._selector.register(end, selectors.EVENT_READ, lambda: self._hear(end))
            except OSError:
                end.close()
                raise
            self._silent[end] = time.monotonic()

    def _forget(self, end: socket.socket) -> None:
        self._selector.unregister(end)
        del self._silent[end]

    def _hear(self, end: socket.socket) -> None:
        """Handle the only message of whoever has connected."""
        self._forget(end)
        try:
            data, held = _received(end)
        except OSError:
            data, held = b"", []
        try:
            launcher = self._admitted(end, data, held)
        except _RefusedError as refused:
            kind, error = refused.args
            Launcher(end, {}, {str(descriptor): descriptor for descriptor in held}).end(kind, error)
            return
        if launcher is None:
            return
        self._joined[launcher.order["launcher"]] = launcher
        self._waiting.append(launcher)

    def _admitted(self, end: socket.socket, data: bytes, held: list[int]) -> Launcher | None:
        """The launcher that joins by a message; None for a message of another kind. Raises _RefusedError."""
        _check_peer(end)
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            raise _RefusedError(TakeoverError.__name__, "not a message of a launcher") from None
        match message:
            case {"type": "check"} if not held:
                with end, contextlib.suppress(OSError):
                    end.send(json.dumps({"version": __version__, "protocol": PROTOCOL}).encode())
                return None
            case {"type": "succeed"} if not held:
                self._successors.append(end)  # which sees this process end
                return None
            case {"type": "join", "protocol": int(protocol), "version": str(version)} if protocol != PROTOCOL:
                raise _RefusedError(TakeoverError.__name__, _mismatch(protocol, version))
            case {
                "type": "join",
                "protocol": int(),
                "mountpoint": str(mountpoint),
                "source": str(source),
                "allow_other": bool(allow_other),
                "cache_dir": str(cache_dir),
                "log_file": str(log_file),
                "names": list(names),
            } if len(names) == len(held) == sum(name in names for name in KEPT):
                if mountpoint != str(self._mountpoint):
                    raise _RefusedError(TakeoverError.__name__, f"this keeper holds {self._mountpoint}")
                self._number += 1
                order = {
                    "mountpoint": mountpoint,
                    "source": source,
                    "allow_other": allow_other,
                    "foreground": True,
                    "server": ["trimsfs serve"],
                    "options": {"cache_dir": cache_dir, "log_file": log_file},
                    "launcher": self._number,
                }
                return Launcher(end, order, dict(zip(names, held, strict=True)))
        raise _RefusedError(TakeoverError.__name__, "not a message of a launcher")


def _check_peer(end: socket.socket) -> None:
    """Check that a peer is root as this process is, and that this process can end it. Raises _RefusedError."""
    pid, uid = peer(end)
    if uid != os.geteuid():
        raise _RefusedError(
            NotPermittedError.__name__,
            f"uid {uid} may not serve: run `trimsfs serve` as the keeper's user, uid {os.geteuid()}, outside of any "
            "user namespace",
        )
    if pid == 0:
        raise _RefusedError(
            TakeoverError.__name__,
            "the keeper does not see this process: run the keeper in the host's PID namespace (hostPID: true)",
        )


def peer(end: socket.socket) -> tuple[int, int]:
    """The pid, 0 in another PID namespace, and uid of a peer when it connected or began to listen."""
    pid, uid, _ = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def _mismatch(protocol: int, version: str) -> str:
    older, of = ("keeper", __version__) if protocol > PROTOCOL else ("server", version)
    return (
        f"the server's trimsfs {version} speaks protocol {protocol}, the keeper's trimsfs {__version__} protocol "
        f"{PROTOCOL}: replace the {older} of version {of} by a newer one"
    )


def _received(end: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors with it, which are close-on-exec. Raises OSError."""
    room = socket.CMSG_SPACE(len(KEPT) * _DESCRIPTOR)
    data, ancillary, _, _ = end.recvmsg(MESSAGE_LIMIT, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) // _DESCRIPTOR * _DESCRIPTOR])
    return data, list(descriptors)


def check(mountpoint: Path, *, timeout_s: float) -> dict[str, Any]:
    """Ask whether a keeper listens for launchers; its version and protocol. Raises KeeperGoneError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
            end.settimeout(timeout_s)
            end.connect(str(launchers_path(mountpoint)))
            end.send(json.dumps({"type": "check"}).encode())
            answer: dict[str, Any] = json.loads(end.recv(MESSAGE_LIMIT))
    except (OSError, ValueError) as error:
        raise KeeperGoneError(
            f"no keeper of {mountpoint} answers at {launchers_path(mountpoint)}: run `mountctl keeper {mountpoint}`"
        ) from error
    return answer


def succeed(mountpoint: Path, *, timeout_s: float) -> None:
    """Have the keeper that listens, if there is one, leave its mount to the next, and wait for its end.

    Kills one that is stopped, or has not ended after *timeout_s*.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end, contextlib.suppress(OSError):
        end.settimeout(timeout_s)
        try:
            end.connect(str(launchers_path(mountpoint)))
        except BlockingIOError:  # so many wait that none can join them: it hangs
            _kill_keeper(mountpoint, timeout_s)
            return
        end.send(json.dumps({"type": "succeed"}).encode())
        pid = peer(end)[0]
        if not stopped(pid):
            with contextlib.suppress(TimeoutError):
                end.recv(1)
                return
        if pid:  # else it is in another PID namespace
            os.kill(pid, signal.SIGKILL)
            end.recv(1)


def _kill_keeper(mountpoint: Path, timeout_s: float) -> None:
    """Kill another keeper of a mount in this mount namespace, and wait for its end. Raises OSError."""
    own = os.readlink("/proc/self/ns/mnt")
    for pid in titled("keeper", mountpoint):
        if pid != os.getpid() and os.readlink(f"/proc/{pid}/ns/mnt") == own:
            process = os.pidfd_open(pid)
            signal.pidfd_send_signal(process, signal.SIGKILL)
            readable([process], timeout_s)
            os.close(process)
