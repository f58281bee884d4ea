"""The keeper: mounts, holds the connection to the kernel, and sees to it that a server answers there.

A server may die or be replaced at any moment. What must outlive it is here: the /dev/fuse descriptor, the ledger in
which servers write what the kernel has been told (the keeper never looks inside) and the lock of the cache directory.
Another server stands by, with everything loaded, and goes on within a moment; what the kernel has asked meanwhile
waits, and what the dead one left unanswered comes again.

The keeper parses nothing but its servers' few messages and its operator's, and never touches the mount: a process that
waits for its own child's answer cannot be cured. Started as ``python -m mountctl.keeper`` with a JSON order on standard
input::

    {"mountpoint": "/models", "source": "s3://bucket", "allow_other": true, "foreground": false, "server": [...]}

``server`` is the command line of the server, which gets the whole order on its own standard input. The first
thing that happens is told as one JSON line on ``--status-fd``: ``{"type": "ready"}`` or ``{"type": "failed",
"kind": ..., "error": ...}``.
"""

import argparse
import contextlib
import errno
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mountctl import mounting, protocol
from mountctl.server import Server
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, mount_at

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_INTERVAL_S = 1.0
DEATH_INTERVAL_S = 0.002
"""How often a server that has been killed is looked at: its successor waits for that."""
STOP_TIMEOUT_S = 15.0
"""How long a server may take to record its state after the file system is unmounted."""
SILENCE_LIMIT_S = 30.0
"""A server that has not been heard of for so long does not answer, and is replaced."""
STABLE_S = 1.0
"""A server that dies sooner after it was ready has not worked."""
SHORT_LIVES = 6
"""So many in a row, and the keeper gives up: whoever waits for an answer is better served with an error."""
BACKOFF_S = 0.1
BACKOFF_LIMIT_S = 5.0


class Keeper:
    """One mount and its servers: the one that serves, and the one that stands by."""

    def __init__(self, order: dict[str, Any], status: int | None) -> None:
        self._order = order
        self._mountpoint = Path(order["mountpoint"])
        self._source = str(order["source"])
        self._status = status
        self._told = False
        self._ledger = os.memfd_create("trimsfs-ledger", os.MFD_CLOEXEC)
        self._lock: int | None = None
        self._fuse: int | None = None
        self._selector = selectors.DefaultSelector()
        self._active: Server | None = None
        self._standby: Server | None = None
        self._unclaimed: int | None = None
        self._restarts = self._short_lives = self._failed_standbys = 0
        self._not_before = 0.0
        self._last_end = ""
        self._exit: int | None = None

    # The loop

    def run(self) -> int:
        """Serve until the file system is unmounted or no server can be kept alive; the exit code."""
        wakeup, waker = socket.socketpair()
        wakeup.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (*ENDING, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._on_signals(wakeup.recv(64)))
        try:
            while self._exit is None:
                self._look()
                if self._exit is None:
                    for key, _ in self._selector.select(self._patience()):
                        act: Callable[[], None] = key.data
                        act()
        finally:
            self._clean_up()
        return self._exit

    def _patience(self) -> float:
        """How long nothing is to be looked at."""
        if self._active is None:
            return max(DEATH_INTERVAL_S, min(LOOK_INTERVAL_S, self._not_before - time.monotonic()))
        return LOOK_INTERVAL_S

    def _look(self) -> None:
        """Do what is due."""
        if self._active is not None:
            if self._active.ended():
                self._on_end(self._active)
            elif time.monotonic() - self._active.heard > SILENCE_LIMIT_S:
                self._log(f"the server (pid {self._active.pid}) does not answer: killing it")
                self._active.kill()
        if self._standby is not None and self._standby.ended():
            self._on_standby_end(self._standby)
        if self._exit is not None or time.monotonic() < self._not_before:
            return
        if self._standby is None:
            self._standby = self._start()
        elif self._active is None and self._standby.standing_by:
            self._promote(self._standby)

    def _on_signals(self, numbers: bytes) -> None:
        if set(ENDING) & set(numbers):
            self._log("unmounting")
            self._unmount()
            self._exit = 0

    # Servers

    def _start(self) -> Server:
        server = Server(self._order)
        self._selector.register(server.channel, selectors.EVENT_READ, lambda: self._on_message(server))
        return server

    def _promote(self, server: Server) -> None:
        """Let the server that stands by serve."""
        self._active, self._standby, self._failed_standbys = server, None, 0
        held = {"ledger": self._ledger, "lock": self._lock, "fuse": self._fuse}
        given = {name: descriptor for name, descriptor in held.items() if descriptor is not None}
        turn = {"descriptors": list(given), "unclaimed": self._unclaimed, "restarts": self._restarts}
        server.send(turn, list(given.values()))

    def _on_message(self, server: Server) -> None:
        try:
            message, descriptors = server.receive()
            if message is None:
                self._selector.unregister(server.channel)  # its end will be seen
                return
            self._answer(server, message, descriptors)
        except protocol.ProtocolError as error:
            self._log(f"the server (pid {server.pid}) said what it must not: {error}: killing it")
            server.kill()

    def _answer(self, server: Server, message: protocol.Message, descriptors: list[int]) -> None:
        try:
            match message:
                case protocol.StandingBy() if server is self._standby:
                    server.standing_by = True
                case protocol.Failed():
                    self._tell({"type": "failed", "kind": message.kind, "error": message.error})
                case _ if server is not self._active:
                    raise protocol.ProtocolError("it is not its turn")
                case protocol.Mount() if self._fuse is None and descriptors:
                    self._mount(server, descriptors.pop())
                case protocol.BackingOpen() if self._fuse is not None:
                    server.send(self._open_backing(server, descriptors))
                case protocol.BackingClose() if self._fuse is not None:
                    with contextlib.suppress(OSError):  # the connection may be gone
                        mounting.close_backing(self._fuse, message.number)
                case protocol.Ready() if self._fuse is not None:
                    self._on_ready(server, message.resends)
                case protocol.Alive():
                    pass
                case _:
                    raise protocol.ProtocolError(f"{type(message).__name__} out of order")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _mount(self, server: Server, lock: int) -> None:
        try:
            self._fuse = mounting.mount(
                self._mountpoint, source=self._source, allow_other=bool(self._order["allow_other"])
            )
        except (mounting.FuseUnavailableError, mounting.MountpointError) as error:
            os.close(lock)
            server.send({"kind": type(error).__name__, "error": str(error)})
        else:
            self._lock = lock
            server.send({}, [self._fuse])

    def _open_backing(self, server: Server, files: list[int]) -> dict[str, Any]:
        assert self._fuse is not None
        try:
            if not files:  # the kernel drops a descriptor that there is no room for
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            server.unclaimed = mounting.open_backing(self._fuse, files[0])
        except OSError as error:
            return {"errno": error.errno, "error": error.strerror}
        return {"id": server.unclaimed}

    def _on_ready(self, server: Server, resends: bool) -> None:
        server.ready_at = time.monotonic()
        self._resends = resends
        if self._told:
            self._log(f"a server (pid {server.pid}) goes on")
            return
        for problem in mounting.tune(self._mountpoint):
            self._log(f"not tuned: {problem}")
        self._tell({"type": "ready"})

    def _on_end(self, server: Server) -> None:
        """The server that served has ended: for good, or to be replaced."""
        self._part(server)
        self._active = None
        self._unclaimed = server.unclaimed
        self._last_end = server.fate()
        if not self._told or self._fuse is None or self._connection_is_gone():
            self._exit = server.status
            return
        self._restarts += 1
        lived_s = 0.0 if server.ready_at is None else time.monotonic() - server.ready_at
        self._short_lives = self._short_lives + 1 if lived_s < STABLE_S else 0
        self._log(f"the server (pid {server.pid}) has ended ({self._last_end}): another goes on")
        self._back_off(self._short_lives)

    def _on_standby_end(self, server: Server) -> None:
        self._part(server)
        self._standby = None
        self._failed_standbys += 1
        if self._active is None:
            if not self._told:
                self._exit = server.status
                return
            self._short_lives += 1
        self._back_off(self._failed_standbys)

    def _back_off(self, times: int) -> None:
        if self._short_lives >= SHORT_LIVES:
            self._log(f"{self._short_lives} servers in a row have ended at once ({self._last_end}): giving up")
            self._exit = 1
        if times:
            self._not_before = time.monotonic() + min(BACKOFF_S * 2 ** (times - 1), BACKOFF_LIMIT_S)

    def _part(self, server: Server) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(server.channel)
        server.channel.close()

    def _connection_is_gone(self) -> bool:
        """Whether the file system is unmounted, and nobody has a file of it open."""
        assert self._fuse is not None
        poll = select.poll()
        poll.register(self._fuse, 0)
        return bool(poll.poll(0))

    # The end

    def _unmount(self) -> None:
        if self._fuse is None:
            return
        try:
            mounting.unmount(self._mountpoint)
        except OSError as error:
            self._log(f"{self._mountpoint}: {error.strerror}: detaching it")
            with contextlib.suppress(OSError):
                mounting.unmount(self._mountpoint, lazy=True)
            if self._active is not None:
                self._active.terminate()

    def _clean_up(self) -> None:
        """Leave neither servers nor mount behind."""
        if self._standby is not None:
            self._part(self._standby)
            self._standby.kill()
        server = self._active
        if server is not None:
            self._part(server)  # nobody is to wait for an answer from here
            if self._fuse is None:
                server.terminate()  # it does not end by itself
            if not server.wait(STOP_TIMEOUT_S):
                # One of its threads may wait in the kernel for an answer that it should itself have given.
                with contextlib.suppress(OSError, LookupError):
                    mounting.abort(self._mountpoint)
                server.kill()
                server.wait(STOP_TIMEOUT_S)
        if self._fuse is not None:
            # Without the descriptor the kernel fails what still waits for an answer, and the unmount cannot block.
            os.close(self._fuse)
            mounted = mount_at(self._mountpoint)
            if mounted is not None and mounted.kind == FILE_SYSTEM_TYPE:
                self._unmount()
        self._tell(
            {
                "type": "failed",
                "kind": "Exception",
                "error": f"the server ended ({self._last_end or 'killed'}) before the mount answered",
            }
        )

    # Telling

    def _tell(self, message: dict[str, Any]) -> None:
        """Tell whoever waits for the mount, once."""
        if self._told:
            return
        self._told = True
        if self._status is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._status, json.dumps(message).encode() + b"\n")
            os.close(self._status)
        elif message["type"] == "failed":
            self._log(message["error"])
        else:
            self._log(f"{self._source} is mounted at {self._mountpoint}")

    def _log(self, text: str) -> None:
        print(f"trimsfs: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point of the keeper process."""
    parser = argparse.ArgumentParser(prog="mountctl.keeper")
    parser.add_argument("--status-fd", type=int)
    status: int | None = parser.parse_args().status_fd
    if status is not None:
        os.set_inheritable(status, False)
    sys.exit(Keeper(json.load(sys.stdin), status).run())


if __name__ == "__main__":
    main()
