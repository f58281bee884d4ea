"""Attaches a model to a running container: bind-mounts it in the container's mount namespace, and unmounts it.

This runs as root, and a container may be hostile. So it resolves a path of the container only below the container's
root. It creates missing directories with the privileges of the user namespace that owns the container's mounts. It
mounts on the very directory that it has opened and checked, even if the container renames it meanwhile.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mountctl.containers.container_errors import error_for
from mountctl.containers.forked_work import TIMEOUT_S, OverdueError, RefusalError, run_in_child
from mountctl.linux import bind_mounts
from mountctl.linux.bind_mounts import Resolve
from mountctl.linux.sockets import GPU_SUFFIX, gpu_path
from trimsfs.errors import ConfigurationError, NoAnswerError
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, mounts
from trimsfs.polling import readable

CONTROL, DELETED = ".trims", "//deleted"
FORBIDDEN = {"proc", "sysfs", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "devtmpfs", "devpts", "mqueue"}
"""File systems through which runtimes set up and confine a container: attach mounts nothing on them."""
ATTEMPTS = 10
"""Tries to resolve a path: the kernel fails with EAGAIN when something is renamed or mounted meanwhile."""
_DIRECTORY = os.O_PATH | os.O_DIRECTORY


class BindSource(NamedTuple):
    """The source of a bind mount: a path of the host or, with *mountpoint*, a path that must stay below that mount.

    It is a model, a whole mount, or the socket of a mount's GPU clients at its path of the host.
    """

    path: str
    mountpoint: str | None = None

    @property
    def host_path(self) -> str:
        return self.path if self.mountpoint is None else os.path.join(self.mountpoint, self.path)


class Target(NamedTuple):
    """A path in a container: below the root of a process or, with *rootfs*, below that directory in its namespace.

    A path below a *rootfs* may contain no symbolic link.
    """

    pid: int
    path: str
    rootfs: str | None = None


def attach(source: BindSource, target: Target, timeout_s: float = TIMEOUT_S) -> None:
    """Bind-mount *source* read-only at *target*; creates a missing mount point. Raises TrimsError."""
    _check_target(target.path)

    def work() -> bytes:
        tree, directory = _clone(source)
        with _entered(target) as (root, proc):
            mountpoint = _mountpoint(root, proc, target, directory)
            if _is_ours(proc, mountpoint):
                raise RefusalError("occupied")
            with _step("mount"):
                bind_mounts.move(tree, mountpoint)
        return b""

    _run(work, source.host_path, target, timeout_s)


def detach(target: Target, timeout_s: float = TIMEOUT_S) -> None:
    """Unmount the attachment at *target*, even if it is in use. Raises TrimsError."""
    _check_target(target.path)
    target = target._replace(path=os.path.normpath(target.path))  # what is above `/opt/model/` is not `/opt/model`

    def work() -> bytes:
        with _entered(target) as (root, proc):
            with _step("resolve"):
                mounted = _resolve(root, target, target.path, os.O_PATH)
                above = _resolve(root, target, os.path.dirname(target.path), _DIRECTORY)
            if not _is_ours(proc, mounted) or _mount_id(proc, mounted) == _mount_id(proc, above):
                raise RefusalError("nothing")
            with _step("unmount"):
                os.fchdir(proc)
                bind_mounts.detach(f"self/fd/{mounted}")
        return b""

    _run(work, "", target, timeout_s)


def _check_target(path: str) -> None:
    parts = path.split("/")
    if not path.startswith("/") or not any(parts) or {".", ".."} & set(parts) or "\0" in path:
        raise ConfigurationError(f"{path!r}: not a path in a container: give an absolute path without . and ..")


def _clone(source: BindSource) -> tuple[int, bool]:
    """Clone *source* as a mount that is attached nowhere yet; also returns whether it is a directory."""
    proc = os.open("/proc", _DIRECTORY | os.O_CLOEXEC)
    with _step("path"):
        if source.mountpoint is None:
            file = os.open(source.path, os.O_PATH | os.O_CLOEXEC)
        else:
            mountpoint = os.open(source.mountpoint, _DIRECTORY | os.O_CLOEXEC)
            closed = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_XDEV | Resolve.NO_MAGICLINKS
            file = bind_mounts.open_below(mountpoint, source.path, os.O_PATH, closed)
        mode = os.fstat(file).st_mode
    if stat.S_ISSOCK(mode):  # no trimsfs mount contains a socket
        if source.path not in {str(gpu_path(mount.mountpoint)) for mount in mounts()}:
            raise RefusalError("not-trimsfs")
    elif _file_system_type(proc, file) != FILE_SYSTEM_TYPE:
        raise RefusalError("not-trimsfs")
    if CONTROL in os.readlink(f"/proc/self/fd/{file}").split("/"):
        raise RefusalError("control")
    with _step("clone"):
        tree = bind_mounts.clone(file)
        bind_mounts.restrict(tree)
    return tree, stat.S_ISDIR(mode)


@contextmanager
def _entered(target: Target) -> Iterator[tuple[int, int]]:
    """Enter a process's mount namespace; yields its root and the host's /proc, which no container can forge."""
    proc = os.open("/proc", _DIRECTORY | os.O_CLOEXEC)
    with _step("process"):
        process = os.pidfd_open(target.pid)
        mounts = os.open(f"/proc/{target.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        root = os.open(f"/proc/{target.pid}/root", _DIRECTORY | os.O_CLOEXEC)
        if readable([process], 0):  # it has ended: another process may have its pid now
            raise ProcessLookupError(errno.ESRCH, "ended")
    if _same(mounts, "/proc/self/ns/mnt"):
        raise RefusalError("own")
    with _step("enter"):
        users = bind_mounts.user_namespace_of(mounts)
        foreign = not _same(users, "/proc/self/ns/user")
        bind_mounts.enter(mounts, bind_mounts.CLONE_NEWNS)
    if target.rootfs is not None:
        with _step("rootfs"):
            root = os.open(target.rootfs, _DIRECTORY | os.O_CLOEXEC)
    if foreign:
        with _step("enter"):
            bind_mounts.enter(users, bind_mounts.CLONE_NEWUSER)
        with contextlib.suppress(OSError):  # not every user namespace maps user 0
            os.setgroups([])
        with contextlib.suppress(OSError):
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
    yield root, proc


def _same(namespace: int, path: str) -> bool:
    return os.path.samestat(os.fstat(namespace), os.stat(path))


def _resolve(root: int, target: Target, path: str, flags: int) -> int:
    resolve = Resolve.IN_ROOT | Resolve.NO_MAGICLINKS
    if target.rootfs is not None:
        resolve |= Resolve.NO_SYMLINKS
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(BlockingIOError):
            return bind_mounts.open_below(root, path, flags, resolve)
    return bind_mounts.open_below(root, path, flags, resolve)


def _mountpoint(root: int, proc: int, target: Target, directory: bool) -> int:
    """Open the mount point; creates it and missing parents, but never on one of the FORBIDDEN file systems."""
    parts = [part for part in target.path.split("/") if part]
    above = root
    for number, name in enumerate(parts, 1):
        path = "/" + "/".join(parts[:number])
        wanted = os.O_PATH if number == len(parts) else _DIRECTORY
        with _step("resolve"):
            try:
                above = _resolve(root, target, path, wanted)
                continue
            except FileNotFoundError:
                _check_file_system(proc, above)
        with _step("create"), contextlib.suppress(FileExistsError):
            if number < len(parts) or directory:
                os.mkdir(name, 0o755, dir_fd=above)
            else:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=above))
        with _step("resolve"):
            above = _resolve(root, target, path, wanted)
    if stat.S_ISDIR(os.fstat(above).st_mode) != directory:
        raise RefusalError("file-type", errno.EISDIR if not directory else errno.ENOTDIR)
    _check_file_system(proc, above)
    return above


def _check_file_system(proc: int, file: int) -> None:
    if _file_system_type(proc, file) in FORBIDDEN:
        raise RefusalError("forbidden")


def _is_ours(proc: int, file: int) -> bool:
    """Whether an open file is an attachment: on trimsfs, or a GPU socket, which the host may have deleted since."""
    file_system_type, root = _mount(proc, file)
    if file_system_type == FILE_SYSTEM_TYPE:
        return True
    return stat.S_ISSOCK(os.fstat(file).st_mode) and root.removesuffix(DELETED).endswith(GPU_SUFFIX)


def _file_system_type(proc: int, file: int) -> str | None:
    """The type of the file system that an open file lies on; None if this mount namespace does not list it."""
    return _mount(proc, file)[0]


def _mount(proc: int, file: int) -> tuple[str | None, str]:
    """The type of the file system that an open file lies on, and the root of its mount."""
    return _mounts(proc).get(_mount_id(proc, file), (None, ""))


def _mount_id(proc: int, file: int) -> int:
    for line in _read(proc, f"self/fdinfo/{file}").splitlines():
        if line.startswith(b"mnt_id:"):
            return int(line.split()[1])
    raise RefusalError("unexpected")


def _mounts(proc: int) -> dict[int, tuple[str, str]]:
    """The mounts of this namespace by mount id: the type of the file system, and the root of the mount."""
    table = _read(proc, "self/mountinfo").decode(errors="surrogateescape")
    lines = table.rstrip("\n").split("\n")  # paths may have other ends of lines
    return {int(line.split(" ", 1)[0]): (line.partition(" - ")[2].split(" ")[0], line.split(" ")[3]) for line in lines}


def _read(proc: int, path: str) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
        return file.read()


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Turn an OSError of the block into a RefusalError that names the step."""
    try:
        yield
    except OSError as error:
        raise RefusalError(name, error.errno or errno.EIO) from None


def _run(work: Callable[[], bytes], source: str, target: Target, timeout_s: float) -> None:
    try:
        run_in_child(work, timeout_s)
    except RefusalError as refusal:
        raise error_for(refusal, source, target.path, target.pid) from None
    except OverdueError:
        raise NoAnswerError(
            f"{source or target.path}: no answer from the mount or the container's file system: see `trimsfs status`"
        ) from None
