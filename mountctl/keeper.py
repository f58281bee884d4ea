"""The keeper: mounts, holds the /dev/fuse descriptor, starts the server and cleans up after it.

It parses nothing but its server's few messages, and never touches the mount: a process that waits for its own
child's answer cannot be cured. Started as ``python -m mountctl.keeper`` with a JSON order on standard input::

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
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from mountctl import mounting
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, mount_at

MESSAGE_LIMIT = 65536
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_INTERVAL_S = 1.0
STRAY_TIMEOUT_S = 0.5
STOP_TIMEOUT_S = 15.0
"""How long a server may take to record its state after the file system is unmounted."""


class Keeper:
    """One mount and its server."""

    def __init__(self, order: dict[str, Any], status: int | None) -> None:
        self._mountpoint = Path(order["mountpoint"])
        self._source = str(order["source"])
        self._allow_other = bool(order["allow_other"])
        self._order = order
        self._status = status
        self._descriptor: int | None = None
        self._told = False

    def run(self) -> int:
        """Serve until the file system is unmounted or the server ends; the exit code."""
        wakeup, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (*ENDING, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = subprocess.Popen(
            [*self._order["server"], "--keeper-fd", str(theirs.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            cwd="/",
        )
        theirs.close()
        assert server.stdin is not None
        with contextlib.suppress(BrokenPipeError), server.stdin:
            server.stdin.write(json.dumps(self._order).encode())
        try:
            self._attend(server, ours, wakeup)
        finally:
            ours.close()  # nobody is to wait for an answer from here
            self._clean_up(server)
        return server.returncode if server.returncode >= 0 else 128 - server.returncode

    def _attend(self, server: "subprocess.Popen[bytes]", channel: socket.socket, wakeup: socket.socket) -> None:
        while not _ended(server):
            readable, _, _ = select.select([channel, wakeup], [], [], LOOK_INTERVAL_S)
            if channel in readable:
                message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_LIMIT, 1)
                if not message:
                    return
                self._answer(channel, json.loads(message), descriptors)
            if wakeup in readable and set(ENDING) & set(wakeup.recv(64)):
                self._unmount(server)
                return

    def _answer(self, channel: socket.socket, message: dict[str, Any], descriptors: list[int]) -> None:
        match message.get("type"):
            case "backing-open":
                channel.send(json.dumps(self._open_backing(descriptors)).encode())
            case "backing-close":
                assert self._descriptor is not None
                with contextlib.suppress(OSError):  # the connection may be gone
                    mounting.close_backing(self._descriptor, message["id"])
            case "mount":
                try:
                    self._descriptor = mounting.mount(
                        self._mountpoint, source=self._source, allow_other=self._allow_other
                    )
                except (mounting.FuseUnavailableError, mounting.MountpointError) as error:
                    answer = {"kind": type(error).__name__, "error": str(error)}
                    channel.send(json.dumps(answer).encode())
                else:
                    socket.send_fds(channel, [b"{}"], [self._descriptor])
            case "ready":
                for problem in mounting.tune(self._mountpoint):
                    print(f"trimsfs: not tuned: {problem}", file=sys.stderr)
                self._tell({"type": "ready"})
            case "failed":
                self._tell(message)

    def _open_backing(self, files: list[int]) -> dict[str, Any]:
        assert self._descriptor is not None
        try:
            if not files:  # the kernel drops a descriptor that there is no room for
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return {"id": mounting.open_backing(self._descriptor, files[0])}
        except OSError as error:
            return {"errno": error.errno, "error": error.strerror}
        finally:
            for file in files:
                os.close(file)

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
            print(f"trimsfs: {message['error']}", file=sys.stderr)
        else:
            print(f"trimsfs: {self._source} is mounted at {self._mountpoint}", file=sys.stderr)

    def _unmount(self, server: "subprocess.Popen[bytes]") -> None:
        if self._descriptor is None:
            return
        try:
            mounting.unmount(self._mountpoint)
        except OSError as error:
            print(f"trimsfs: {self._mountpoint}: {error.strerror}: detaching it", file=sys.stderr)
            with contextlib.suppress(OSError):
                mounting.unmount(self._mountpoint, lazy=True)
            server.terminate()

    def _clean_up(self, server: "subprocess.Popen[bytes]") -> None:
        """Leave neither server nor mount behind."""
        if self._descriptor is None and not self._told:
            server.terminate()  # it does not end by itself
        try:
            server.wait(STOP_TIMEOUT_S if not _ended(server) else STRAY_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # One of its threads may wait in the kernel for an answer that it should itself have given.
            with contextlib.suppress(OSError, LookupError):
                mounting.abort(self._mountpoint)
            server.kill()
            server.wait()
        if self._descriptor is not None:
            # Without the descriptor the kernel fails what still waits for an answer, and the unmount cannot block.
            os.close(self._descriptor)
            mounted = mount_at(self._mountpoint)
            if mounted is not None and mounted.kind == FILE_SYSTEM_TYPE:
                self._unmount(server)
        self._tell(
            {
                "type": "failed",
                "kind": "Exception",
                "error": f"the server ended with status {server.returncode} before the mount answered",
            }
        )


def _ended(server: "subprocess.Popen[bytes]") -> bool:
    """Whether the server has ended, or all of it but threads that the kernel holds."""
    if server.poll() is not None:
        return True
    try:
        state = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in {"Z", "X"}


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
