"""Where the sockets of a mount's keeper are, and how they come to be there."""

import contextlib
import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimsfs.mountinfo import escape

ROOTS_DIRECTORY = Path("/run/trimsfs")
GPU_SUFFIX = ".gpu"
_NAME_LIMIT = 64
"""Of a socket's name: all of its path has to fit into 107 bytes."""

_SIOCUNIXFILE = 0x89E0  # of <linux/un.h>


class ListenError(Exception):
    """There can be no such socket."""


def socket_path(mountpoint: Path) -> Path:
    """Where the keeper of a mount listens to its operator: root's, or this user's."""
    name = escape(mountpoint)
    if len(os.fsencode(name)) > _NAME_LIMIT:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    roots = ROOTS_DIRECTORY / f"{name}.sock"
    if os.geteuid() == 0 or roots.exists():
        return roots
    run = Path(f"/run/user/{os.geteuid()}")
    return (run / "trimsfs" if run.is_dir() else Path(f"/tmp/trimsfs-{os.geteuid()}")) / f"{name}.sock"  # noqa: S108


def gpu_path(mountpoint: Path) -> Path:
    """Where clients of a mount's GPU copies connect: beside the operator's socket."""
    return socket_path(mountpoint).with_suffix(GPU_SUFFIX)


def listen_at(path: Path, kind: socket.SocketKind, *, mode: int, backlog: int) -> socket.socket:
    """A socket that listens at a path in a directory of this user's, which is made if need be, and does not block.

    Raises ListenError.
    """
    try:
        with _umask(0o022):  # whom the mode lets in has to get there
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.lstat().st_uid != os.geteuid():  # nor a link of theirs to a directory of ours
            raise ListenError(f"{path.parent} is another user's")
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


class Place:
    """Where a socket listens. Another keeper's socket may have taken its name meanwhile."""

    def __init__(self, listener: socket.socket) -> None:
        self._path: str = listener.getsockname()
        self._inode = _bound_to(listener) or _inode_at(self._path)

    def remove(self) -> None:
        """Take the name away, if it still is this socket's. Before that is closed: then its inode may be another's."""
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
    """The inode that a socket is bound to, wherever its path leads; None for who lacks CAP_NET_ADMIN."""
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
