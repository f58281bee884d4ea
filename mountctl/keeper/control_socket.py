"""The control socket of a keeper: one line of JSON each way, over a Unix socket that only its owner may use."""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mountctl.linux.listener import Listener
from mountctl.linux.sockets import ListenError, NotTheirsError, socket_of, socket_path
from trimsfs.mountinfo import trimsfs_at
from trimsfs.polling import readable
from trimsfs.processes import stopped, title_of
from trimsfs.text import title

REQUEST_LIMIT = 65536
REQUEST_TIMEOUT_S = 5.0
PATIENCE_S = 2.0
"""How long a keeper may be silent before who asks it looks whether it is stopped."""

Reply = Callable[[dict[str, Any]], None]


class KeeperGoneError(Exception):
    """No keeper runs, or it does not answer."""


class KeeperSilentError(KeeperGoneError):
    """A keeper runs and does not answer."""


class KeeperRefusesError(KeeperGoneError):
    """The keeper answers only the user who mounted, and root."""


def ask(mountpoint: Path, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Send a request to the keeper of a mount, which for root is that of who mounted; its reply.

    Raises KeeperGoneError.
    """
    mount = trimsfs_at(mountpoint) if os.geteuid() == 0 else None
    user = os.geteuid() if mount is None else mount.user
    path = socket_path(mountpoint, user)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.settimeout(timeout_s)
            with nullcontext(str(path)) if user == os.geteuid() else socket_of(user, path) as checked:
                end.connect(checked)
            end.sendall(json.dumps(request).encode() + b"\n")
            if not readable([end], min(PATIENCE_S, timeout_s)):
                _check_not_stopped(mountpoint, user)
            return _answer(end, timeout_s)
    except NotTheirsError as error:
        raise KeeperRefusesError(f"the keeper of {mountpoint} is not asked: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        # If this user has no socket of the mount, another user mounted it.
        if isinstance(error, PermissionError) or (isinstance(error, FileNotFoundError) and os.geteuid() != 0):
            raise KeeperRefusesError(f"only root and the user who mounted {mountpoint} may ask its keeper") from None
        _check_not_stopped(mountpoint, user)
        if isinstance(error, TimeoutError | BlockingIOError):  # or so many wait that none can join them
            message = f"the keeper of {mountpoint} does not answer: run `mountctl recover {mountpoint}`"
            raise KeeperSilentError(message) from None
        raise KeeperGoneError(f"the keeper of {mountpoint} is gone: run `mountctl recover {mountpoint}`") from error


def _answer(end: socket.socket, timeout_s: float) -> dict[str, Any]:
    """The answer of a keeper, which another user may have replaced. Raises OSError, ValueError, RecursionError."""
    deadline, text = time.monotonic() + timeout_s, b""
    while b"\n" not in text and len(text) < REQUEST_LIMIT:
        if (left_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        end.settimeout(left_s)
        if not (piece := end.recv(REQUEST_LIMIT)):
            break
        text += piece
    answer = json.loads(text.partition(b"\n")[0])
    if not isinstance(answer, dict):
        raise ValueError("not a JSON object")
    return answer


def titled(role: str, mountpoint: Path, among: Callable[[int], bool] | None = None) -> list[int]:
    """The processes that claim to have a role in a mount, of all or *among* some, the only ones whose titles it reads.

    The title of a process that waits for a mount may be as long in coming.
    """
    pids = map(int, filter(str.isdecimal, os.listdir("/proc")))
    return [pid for pid in filter(among, pids) if title_of(pid) == title(role, mountpoint)]


def _check_not_stopped(mountpoint: Path, user: int) -> None:
    """Raises KeeperGoneError if the mount's keeper, of a user or root, is stopped."""
    for pid in titled("keeper", mountpoint, among=stopped):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(f"/proc/{pid}").st_uid in {0, user}:
                remedy = f"run `kill -CONT {pid}`, or `mountctl recover {mountpoint}`"
                raise KeeperGoneError(f"the keeper is stopped (pid {pid}): {remedy}")


class ControlSocket:
    """Listens for operators in the keeper's loop. *handle* gets each request and a function to reply, now or later."""

    def __init__(self, selector: selectors.BaseSelector, handle: Callable[[dict[str, Any], Reply], None]) -> None:
        self._selector = selector
        self._handle = handle
        self._listener: Listener | None = None
        self._received: dict[socket.socket, bytes] = {}

    def listen(self, mountpoint: Path) -> str | None:
        """Begin to listen; the error if that fails."""
        try:
            self._listener = Listener(socket_path(mountpoint), socket.SOCK_STREAM, self._selector, self._read)
        except ListenError as error:
            return str(error)
        return None

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def drop_idle(self) -> None:
        """Close connections that have sent no request in time."""
        for end in self._listener.drop_idle(REQUEST_TIMEOUT_S) if self._listener is not None else ():
            self._received.pop(end, None)

    def _read(self, end: socket.socket) -> None:
        try:
            piece = end.recv(REQUEST_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        text = self._received.pop(end, b"") + piece
        if piece and b"\n" not in text and len(text) <= REQUEST_LIMIT:
            self._received[end] = text
            return
        assert self._listener is not None
        self._listener.release(end)
        if not piece or len(text) > REQUEST_LIMIT:
            end.close()
        else:
            self._dispatch(end, text)

    def _dispatch(self, end: socket.socket, text: bytes) -> None:
        def reply(answer: dict[str, Any]) -> None:
            with contextlib.suppress(OSError), end:
                end.sendall(json.dumps(answer).encode() + b"\n")

        try:
            request = json.loads(text)
        except (ValueError, RecursionError):
            request = None
        if isinstance(request, dict):
            self._handle(request, reply)
        else:
            reply({"error": "not a JSON object"})
