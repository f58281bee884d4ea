"""The sockets of a keeper: their paths, listening there, and removing them."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimsfs.mountinfo import escape

ROOTS_DIRECTORY = Path("/run/trimsfs")
GPU_SUFFIX = ".gpu"
LAUNCHERS_SUFFIX = ".servers"
_NAME_LIMIT = 64
"""Bytes of a socket's name: its whole path must fit into 107."""

_SIOCUNIXFILE = 0x89E0  # of <linux/un.h>


class ListenError(Exception):
    """The socket cannot be created."""


def socket_path(mountpoint: Path) -> Path:
    """The control socket of a mount's keeper: root's, or this user's."""
    name = escape(mountpoint)
    if len(os.fsencode(name)) > _NAME_LIMIT:
        import hashlib  # noqa: PLC0415 - seldom needed: it takes memory

        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    roots = ROOTS_DIRECTORY / f"{name}.sock"
    if os.geteuid() == 0 or roots.exists():
        return roots
    run = Path(f"/run/user/{os.geteuid()}")
    return (run / "trimsfs" if run.is_dir() else Path(f"/tmp/trimsfs-{os.geteuid()}")) / f"{name}.sock"  # noqa: S108


def gpu_path(mountpoint: Path) -> Path:
    """The socket of a mount's GPU clients: beside the control socket."""
    return socket_path(mountpoint).with_suffix(GPU_SUFFIX)


def launchers_path(mountpoint: Path) -> Path:
    """The socket at which launchers of servers join a mount's keeper: beside the control socket."""
    return socket_path(mountpoint).with_suffix(LAUNCHERS_SUFFIX)


def listen_at(path: Path, kind: socket.SocketKind, *, mode: int, backlog: int) -> socket.socket:
    """A non-blocking socket that listens at a path. Its directory is created if missing, and must be this user's.

    Raises ListenError.
    """
    try:
        with _umask(0o022):  # the users whom the mode admits must reach it
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.lstat().st_uid != os.geteuid():  # lstat: another user's link to our directory is refused
            raise ListenError(f"{path.parent} belongs to another user")
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with _umask(0o777 & ~mode):
                listener.bind(os.fsencode(path))
            listener.listen(backlog)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ListenError(f"{path}: {error.strerror}") from error
    return listener


class BoundPath:
    """The path that a socket is bound to, where another keeper's socket may have replaced it."""

    def __init__(self, listener: socket.socket) -> None:
        self._path: str = listener.getsockname()
        self._inode = _bound_to(listener) or _inode_at(self._path)

    def remove(self) -> None:
        """Remove the path if it still is this socket's. Call it before closing: later the inode may be another's."""
        with contextlib.suppress(OSError):
            if _inode_at(self._path) == self._inode:
                os.unlink(self._path)


def _inode_at(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _bound_to(listener: socket.socket) -> tuple[int, int] | None:
    """The inode that a socket is bound to, wherever its path leads; None without CAP_NET_ADMIN."""
    try:
        file = fcntl.ioctl(listener, _SIOCUNIXFILE)
    except OSError:
        return None
    try:
        status = os.fstat(file)
    finally:
        os.close(file)
    return status.st_dev, status.st_ino


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
