"""The sockets of a keeper: their paths, listening there, and removing them."""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimsfs.mountinfo import escape, holding

ROOTS_DIRECTORY = Path("/run/trimsfs")
GPU_SUFFIX = ".gpu"
LAUNCHERS_SUFFIX = ".servers"
DIRECTORIES_MADE = 3
"""How often a directory is made that other keepers remove meanwhile."""
_NAME_LIMIT = 64
"""Bytes of a socket's name: its whole path must fit into 107."""

_SIOCUNIXFILE = 0x89E0  # of <linux/un.h>


class ListenError(Exception):
    """The socket cannot be created."""


class NotTheirsError(Exception):
    """What lies at the path of a user's socket is no socket of that user."""


def socket_path(mountpoint: Path, user: int | None = None) -> Path:
    """The control socket of a mount's keeper: root's, or that of a *user*, by default this one."""
    user = os.geteuid() if user is None else user
    name = escape(mountpoint)
    if len(os.fsencode(name)) > _NAME_LIMIT:
        import hashlib  # noqa: PLC0415 - seldom needed: it takes memory

        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    roots = ROOTS_DIRECTORY / f"{name}.sock"
    if user == 0 or roots.exists():
        return roots
    run = Path(f"/run/user/{user}")
    return (run / "trimsfs" if run.is_dir() else _temporary_directory(user)) / f"{name}.sock"


def _temporary_directory(user: int) -> Path:
    """Where a user's sockets are without a directory of its own in /run; gone with the last of them."""
    return Path(f"/tmp/trimsfs-{user}")  # noqa: S108


@contextmanager
def socket_of(user: int, path: Path) -> Iterator[str]:
    """A path to connect to for root, which leads to a socket of another *user* or root and nowhere else.

    That user may put anything at *path*: a link to a socket of others, or a mount on which root would wait for ever.
    Raises NotTheirsError, OSError.
    """
    over = holding(path)
    if over is not None and over.user != 0:
        raise NotTheirsError(f"{path} lies on a mount of another user")
    with contextlib.ExitStack() as stack:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        file = os.open(path.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        stack.callback(os.close, file)
        above, status = os.fstat(directory), os.fstat(file)
        if above.st_uid not in {0, user} or status.st_uid != above.st_uid or not stat.S_ISSOCK(status.st_mode):
            raise NotTheirsError(f"{path} is no socket of uid {user} in a directory of its own")
        yield f"/proc/self/fd/{file}"


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
        for attempt in range(1, DIRECTORIES_MADE + 1):
            try:
                with _umask(0o022):  # the users whom the mode admits must reach it
                    path.parent.mkdir(parents=True, exist_ok=True)
                return _listener(path, kind, mode=mode, backlog=backlog)
            except (FileExistsError, FileNotFoundError):  # other keepers have removed the directory
                if attempt == DIRECTORIES_MADE:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")
    except OSError as error:
        raise ListenError(f"{path}: {error.strerror}") from error


def _listener(path: Path, kind: socket.SocketKind, *, mode: int, backlog: int) -> socket.socket:
    _check_owner(path.parent)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with _umask(0o777 & ~mode):
            listener.bind(os.fsencode(path))
        _check_owner(path.parent)  # it may have been removed, and made by another user
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _check_owner(directory: Path) -> None:
    if directory.lstat().st_uid != os.geteuid():  # lstat: another user's link to our directory is refused
        raise ListenError(f"{directory} belongs to another user")


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
                directory = _temporary_directory(os.geteuid())
                if directory == Path(self._path).parent:
                    directory.rmdir()  # unless others have sockets there


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
