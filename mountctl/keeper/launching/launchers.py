"""Launchers: processes elsewhere, as in another container, that join a keeper and start servers for it.

They connect to a socket that only root may use. A launcher also keeps copies of what the keeper holds, so that it can
hand them to the next keeper.
"""

import contextlib
import json
import os
import select
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mountctl.keeper.control_socket import Reply
from mountctl.keeper.launching.launcher_socket import KEPT, MESSAGE_LIMIT, PROTOCOL, SERVER, peer
from mountctl.keeper.servers.forked_server import ForkedServer
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.servers.server_source import Order
from mountctl.linux import descriptor_passing
from mountctl.linux.listener import Listener
from mountctl.linux.sockets import launchers_path
from trimsfs import __version__
from trimsfs.errors import NotPermittedError, TakeoverError
from trimsfs.processes import StopWatch

JOIN_TIMEOUT_S = 5.0


class _RefusedError(Exception):
    """A launcher may not join: the error's class, by name, and one line for its operator."""


class Launcher:
    """A launcher that has joined; *held* are descriptors that it kept from an earlier keeper, by name.

    Its order is that of a keeper, with the options that a keeper needs, and the launcher's number.
    """

    def __init__(self, end: socket.socket, order: Order, held: dict[str, int]) -> None:
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

    def start(self, order: Order) -> ForkedServer:
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

    def answer(self, outcome: dict[str, Any]) -> None:
        """End it if its server could not replace the one before."""
        if "error" in outcome:
            self.end(str(outcome.get("kind", TakeoverError.__name__)), _for_launcher(outcome["error"]))

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
        descriptor_passing.send(self._end, json.dumps(message).encode(), descriptors, flags=socket.MSG_DONTWAIT)


class Launchers:
    """Listens for launchers of a mount, whose servers are a keeper's `ServerSource`. Raises ListenError.

    A selector can watch its `fileno`; call `poll` when it is readable.
    """

    elsewhere = True

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._selector = selectors.EpollSelector()
        self._listener = Listener(launchers_path(mountpoint), socket.SOCK_SEQPACKET, self._selector, self._hear)
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
        self._listener.drop_idle(JOIN_TIMEOUT_S)

    def wait(self, grace_s: float) -> Launcher:
        """Wait for a launcher: for *grace_s* after the first, for one that kept the descriptors of a mount.

        Raises SystemExit when this keeper is to `leave`.
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

    def living(self) -> list[Launcher]:
        """The launchers that serve or have served, the latest first."""
        for number, each in list(self._joined.items()):
            if each.gone:
                self._joined.pop(number).close()
        return [each for _, each in sorted(self._joined.items(), reverse=True) if each not in self._waiting]

    def end(self, kind: str, error: str) -> None:
        """End the launchers that serve or have served: as `Launcher.end`."""
        for launcher in self.living():
            launcher.end(kind, error)

    def close(self) -> None:
        """Stop listening. Launchers that have joined see that the keeper has ended, and wait for the next."""
        self._listener.close()
        for launcher in self._joined.values():
            launcher.close()
        for end in self._successors:
            end.close()
        self._selector.close()

    # The source of servers

    def newcomers(self) -> Iterator[tuple[Order, Reply]]:
        while (launcher := self.take()) is not None:
            launcher.drop_held()
            yield launcher.order, launcher.answer

    def can_start(self, order: Order) -> bool:
        return self._of(order) is not None

    def start(self, order: Order, *, spare: bool, alone: bool) -> ServerProcess:
        if (launcher := self._of(order)) is None:
            raise OSError("its launcher has ended")
        return launcher.start(order)

    def another(self) -> Order | None:
        return next((launcher.order for launcher in self.living()), None)

    def problem(self, order: Order) -> str | None:
        launcher = self._of(order)
        if launcher is None or not launcher.stays_stopped:
            return None
        pid = launcher.pid
        return f"pid {pid}, is stopped: no other server starts: run `kill -CONT {pid}`"

    def keep(self, server: ServerProcess | None, descriptors: Mapping[str, int]) -> None:
        current = self._of(server.order) if server is not None else None
        for launcher in self.living():
            if launcher is not current:
                launcher.keep({})  # what it kept of its server is out of date
        if current is not None:
            of_server = {SERVER: server.pidfd} if descriptors and isinstance(server, ForkedServer) else {}
            current.keep({**descriptors, **of_server})

    def refuse(self, server: ServerProcess, kind: str, error: str) -> str:
        error = _for_launcher(error)
        if (launcher := self._of(server.order)) is not None:
            launcher.end(kind, error)
        return error

    def _of(self, order: Order) -> Launcher | None:
        """The launcher that an order came from, if it lives."""
        launcher = self._joined.get(order["launcher"])
        return launcher if launcher is not None and not launcher.gone else None

    # Joining

    def _hear(self, end: socket.socket) -> None:
        """Handle the only message of whoever has connected."""
        self._listener.release(end)
        try:
            data, held, _ = descriptor_passing.receive(end, MESSAGE_LIMIT, len(KEPT))
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
                "protocol": int(protocol),
                "mountpoint": str(mountpoint),
                "source": str(source),
                "allow_other": bool(allow_other),
                "cache_dir": str(cache_dir),
                "log_file": str(log_file),
                "names": list(names),
            } if protocol == PROTOCOL and len(names) == len(held) == sum(name in names for name in KEPT):
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


def _mismatch(protocol: int, version: str) -> str:
    older, of = ("keeper", __version__) if protocol > PROTOCOL else ("server", version)
    return (
        f"the server's trimsfs {version} speaks protocol {protocol}, the keeper's trimsfs {__version__} protocol "
        f"{PROTOCOL}: replace the {older} of version {of} by a newer one"
    )


def _for_launcher(error: str) -> str:
    """An error for the operator of a launcher: its mount comes up by another command than that of other keepers."""
    return error.replace("`mountctl up`", "start `trimsfs serve` again")
