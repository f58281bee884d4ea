"""The socket at which launchers join a keeper: its messages, who may send them, and what others ask there.

Only root may use it.
"""

import contextlib
import json
import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any

from mountctl.keeper.control_socket import KeeperGoneError, titled
from mountctl.keeper.descriptor_store import LISTENER
from mountctl.linux.sockets import launchers_path
from trimsfs.polling import readable
from trimsfs.processes import stopped

PROTOCOL = 1
"""The version of the messages between keeper and launcher. It changes when one of the two can no longer use what an
earlier version of the other sends. Both ignore additional fields."""
MESSAGE_LIMIT = 16384
SERVER = "server"
"""The name under which a launcher keeps the pidfd of the server that serves."""
KEPT = ("fuse", "ledger", "lock", LISTENER, SERVER)
_CREDENTIALS = struct.Struct("=iII")


def peer(end: socket.socket) -> tuple[int, int]:
    """The pid, 0 in another PID namespace, and uid of a peer when it connected or began to listen."""
    pid, uid, _ = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


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
