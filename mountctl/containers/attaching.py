"""Mounting a model in the mount namespace of another process, and unmounting it.

A container may be hostile, and these run as root. So a path of the container is only ever resolved below its root, as
the container itself would; what is missing there is made with no more privileges than the user namespace has that the
container's mounts belong to; the mount goes to the very directory that was opened and looked at, whatever its name
leads to by then.
"""

import contextlib
import errno
import os
import select
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mountctl.containers.children import TIMEOUT_S, RefusalError, answer_of
from mountctl.containers.errors import ArgumentError, NoAnswerError
from mountctl.containers.explaining import explained
from mountctl.linux import bind_mounts
from mountctl.linux.bind_mounts import Resolve
from mountctl.linux.sockets import GPU_SUFFIX, gpu_path
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, mounts

CONTROL, DELETED = ".trims", "//deleted"
FORBIDDEN = {"proc", "sysfs", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "devtmpfs", "devpts", "mqueue"}
"""File systems through which runtimes set up and confine a container: nothing is to be mounted in their place."""
ATTEMPTS = 10
"""Resolving below a root fails for a moment when something is renamed meanwhile."""
_DIRECTORY = os.O_PATH | os.O_DIRECTORY


class Source(NamedTuple):
    """A model: a path of the host or, with *mountpoint*, a path below that mount which leads nowhere else.

    The socket of the clients of a mount's GPU copies, at its path of the host, can be one as well.
    """

    path: str
    mountpoint: str | None = None

    @property
    def whole(self) -> str:
        return self.path if self.mountpoint is None else os.path.join(self.mountpoint, self.path)


class Place(NamedTuple):
    """Where in whose mounts: below the root of a process or, with *rootfs*, below that directory in its namespace.

    A place in a *rootfs* is reached by way of no symbolic link.
    """

    pid: int
    target: str
    rootfs: str | None = None


def attach(source: Source, place: Place, timeout_s: float = TIMEOUT_S) -> None:
    """Mount a model, read-only; its mount point is made if need be. Raises ContainerError."""
    _check_target(place.target)

    def work() -> bytes:
        tree, directory = _tree(source)
        with _entered(place) as (root, proc):
            target = _made(root, proc, place, directory)
            if _is_ours(proc, target):
                raise RefusalError("occupied")
            with _step("mount"):
                bind_mounts.move(tree, target)
        return b""

    _carried_out(work, source.whole, place, timeout_s)


def detach(place: Place, timeout_s: float = TIMEOUT_S) -> None:
    """Unmount a model, also one that is in use. Raises ContainerError."""
    _check_target(place.target)

    def work() -> bytes:
        with _entered(place) as (root, proc):
            with _step("resolve"):
                target = _resolved(root, place, place.target, os.O_PATH)
                above = _resolved(root, place, os.path.dirname(place.target), _DIRECTORY)
            if not _is_ours(proc, target) or _mount_number(proc, target) == _mount_number(proc, above):
                raise RefusalError("nothing")
            with _step("unmount"):
                os.fchdir(proc)
                bind_mounts.detach(f"self/fd/{target}")
        return b""

    _carried_out(work, "", place, timeout_s)


def _check_target(target: str) -> None:
    parts = target.split("/")
    if not target.startswith("/") or not any(parts) or {".", ".."} & set(parts) or "\0" in target:
        raise ArgumentError(f"{target!r}: not a place in a container: give an absolute path without . and ..")


def _tree(source: Source) -> tuple[int, bool]:
    """The model as a mount that is mounted nowhere yet, and whether it is a directory."""
    proc = os.open("/proc", _DIRECTORY | os.O_CLOEXEC)
    with _step("path"):
        if source.mountpoint is None:
            file = os.open(source.path, os.O_PATH | os.O_CLOEXEC)
        else:
            mountpoint = os.open(source.mountpoint, _DIRECTORY | os.O_CLOEXEC)
            closed = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_XDEV | Resolve.NO_MAGICLINKS
            file = bind_mounts.open_below(mountpoint, source.path, os.O_PATH, closed)
        mode = os.fstat(file).st_mode
    if stat.S_ISSOCK(mode):  # a mount has none
        if source.path not in {str(gpu_path(mount.mountpoint)) for mount in mounts()}:
            raise RefusalError("not-trimsfs")
    elif _kind(proc, file) != FILE_SYSTEM_TYPE:
        raise RefusalError("not-trimsfs")
    if CONTROL in os.readlink(f"/proc/self/fd/{file}").split("/"):
        raise RefusalError("control")
    with _step("clone"):
        tree = bind_mounts.clone(file)
        bind_mounts.restrict(tree)
    return tree, stat.S_ISDIR(mode)


@contextmanager
def _entered(place: Place) -> Iterator[tuple[int, int]]:
    """Be in the mount namespace of a process: its root, and the host's /proc, which it cannot have made up."""
    proc = os.open("/proc", _DIRECTORY | os.O_CLOEXEC)
    with _step("process"):
        process = os.pidfd_open(place.pid)
        mounts = os.open(f"/proc/{place.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        root = os.open(f"/proc/{place.pid}/root", _DIRECTORY | os.O_CLOEXEC)
        if select.select([process], [], [], 0)[0]:  # it has ended: these may have been another's of the same number
            raise ProcessLookupError(errno.ESRCH, "ended")
    if _same(mounts, "/proc/self/ns/mnt"):
        raise RefusalError("own")
    with _step("enter"):
        users = bind_mounts.user_namespace_of(mounts)
        foreign = not _same(users, "/proc/self/ns/user")
        bind_mounts.enter(mounts, bind_mounts.CLONE_NEWNS)
    if place.rootfs is not None:
        with _step("rootfs"):
            root = os.open(place.rootfs, _DIRECTORY | os.O_CLOEXEC)
    if foreign:
        with _step("enter"):
            bind_mounts.enter(users, bind_mounts.CLONE_NEWUSER)
        with contextlib.suppress(OSError):  # not every namespace has a user 0
            os.setgroups([])
        with contextlib.suppress(OSError):
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
    yield root, proc


def _same(namespace: int, path: str) -> bool:
    return os.path.samestat(os.fstat(namespace), os.stat(path))


def _resolved(root: int, place: Place, path: str, flags: int) -> int:
    resolve = Resolve.IN_ROOT | Resolve.NO_MAGICLINKS
    if place.rootfs is not None:
        resolve |= Resolve.NO_SYMLINKS
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(BlockingIOError):
            return bind_mounts.open_below(root, path, flags, resolve)
    return bind_mounts.open_below(root, path, flags, resolve)


def _made(root: int, proc: int, place: Place, directory: bool) -> int:
    """The mount point, made if it is missing, with all directories above it; never on what is the kernel's."""
    parts = [part for part in place.target.split("/") if part]
    above = root
    for number, name in enumerate(parts, 1):
        path = "/" + "/".join(parts[:number])
        wanted = os.O_PATH if number == len(parts) else _DIRECTORY
        with _step("resolve"):
            try:
                above = _resolved(root, place, path, wanted)
                continue
            except FileNotFoundError:
                _check_kind(proc, above)
        with _step("create"), contextlib.suppress(FileExistsError):
            if number < len(parts) or directory:
                os.mkdir(name, 0o755, dir_fd=above)
            else:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=above))
        with _step("resolve"):
            above = _resolved(root, place, path, wanted)
    if stat.S_ISDIR(os.fstat(above).st_mode) != directory:
        raise RefusalError("kind", errno.EISDIR if not directory else errno.ENOTDIR)
    _check_kind(proc, above)
    return above


def _check_kind(proc: int, file: int) -> None:
    if _kind(proc, file) in FORBIDDEN:
        raise RefusalError("forbidden")


def _is_ours(proc: int, file: int) -> bool:
    """Whether an open file lies on a mount of what is attached: a model, or a socket, which may be gone on the host."""
    kind, root = _mount(proc, file)
    if kind == FILE_SYSTEM_TYPE:
        return True
    return stat.S_ISSOCK(os.fstat(file).st_mode) and root.removesuffix(DELETED).endswith(GPU_SUFFIX)


def _kind(proc: int, file: int) -> str | None:
    """The type of the file system that an open file lies on, if it is mounted where this process can see it."""
    return _mount(proc, file)[0]


def _mount(proc: int, file: int) -> tuple[str | None, str]:
    """The type of that file system, and what of it is mounted."""
    return _mounts(proc).get(_mount_number(proc, file), (None, ""))


def _mount_number(proc: int, file: int) -> int:
    """The number of the mount that an open file lies on."""
    for line in _read(proc, f"self/fdinfo/{file}").splitlines():
        if line.startswith(b"mnt_id:"):
            return int(line.split()[1])
    raise RefusalError("unexpected")


def _mounts(proc: int) -> dict[int, tuple[str, str]]:
    """The mounts that this process sees, by number: the type of the file system, and what of it is mounted."""
    lines = _read(proc, "self/mountinfo").decode(errors="surrogateescape").splitlines()
    return {int(line.split(" ", 1)[0]): (line.partition(" - ")[2].split(" ")[0], line.split(" ")[3]) for line in lines}


def _read(proc: int, path: str) -> bytes:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as file:
        return file.read()


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Have a system call that fails be told by the step it belongs to."""
    try:
        yield
    except OSError as error:
        raise RefusalError(name, error.errno or errno.EIO) from None


def _carried_out(work: Callable[[], bytes], source: str, place: Place, timeout_s: float) -> None:
    try:
        answer_of(work, timeout_s)
    except RefusalError as refusal:
        raise explained(refusal, source, place.target, place.pid) from None
    except NoAnswerError:
        raise NoAnswerError(
            f"{source or place.target}: no answer from the mount or the container's file system: see `trimsfs status`"
        ) from None
