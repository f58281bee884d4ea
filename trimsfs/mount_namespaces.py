"""Mount namespaces: lists the mounts in all of them, finds what an unmount leaves, and unmounts it."""

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from trimsfs.mountinfo import Mount, mounts
from trimsfs.polling import readable

TIMEOUT_S = 5.0
"""Timeout of work in another namespace, where file systems may hang."""
_CLONE_NEWNS, _MNT_DETACH = 0x00020000, 2
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC = 0x1000, 0x4000
_STATX_MNT_ID_UNIQUE = 0x4000
_MASK, _MOUNT = struct.Struct("=I"), struct.Struct("=144xQ")
"""Where a ``struct statx`` says what it has, and which mount a file lies on."""

_libc = ctypes.CDLL(None, use_errno=True)


def namespaces() -> tuple[dict[int, list[Mount]], bool]:
    """All mounts of each mount namespace, by the pid of a process in it (this process's for its own).

    The second value tells whether this user may not look at some processes.
    """
    mounts_by_pid = {os.getpid(): mounts(None)}
    known, hidden = {os.readlink("/proc/self/ns/mnt")}, False
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in known:
                mounts_by_pid[pid] = mounts(None, process=pid)
                known.add(namespace)
        except PermissionError:
            hidden = True
        except (OSError, ValueError):
            pass  # it has ended
    return mounts_by_pid, hidden


def outliving(mount: Mount, places: Mapping[int, Sequence[Mount]]) -> list[tuple[int, Mount]]:
    """The mounts of a file system that stay when *mount* is unmounted, each with the pid of a process in its namespace.

    The kernel propagates an unmount like a mount: to the same place on all mounts that the peer group of the parent
    reaches.
    """
    known = {each.number: each for there in places.values() for each in there}
    parent = known.get(mount.parent)
    groups = {parent.shared} - {0} if parent is not None else set()
    while reached := {each.shared for each in known.values() if each.master in groups} - groups - {0}:
        groups |= reached

    def goes(each: Mount) -> bool:
        above = known.get(each.parent)
        if each.number == mount.number or above is None or parent is None:
            return each.number == mount.number
        return bool({above.shared, above.master} & groups) and _place(each, above) == _place(mount, parent)

    same = [(pid, each) for pid, there in places.items() for each in there if each.device == mount.device]
    return [(pid, each) for pid, each in same if not goes(each)]


def _place(mount: Mount, parent: Mount) -> Path:
    """Where on the file system of its parent a mount lies."""
    return Path(parent.root, mount.mountpoint.relative_to(parent.mountpoint))


def overlays(mount: Mount, places: Mapping[int, Sequence[Mount]]) -> list[tuple[int, Mount]]:
    """The overlays that have a lower layer on the file system of *mount*, each with the pid of a process in its
    namespace. They keep the file system when it is unmounted.

    The kernel lists no mount of a lower layer, only the path by which whoever mounted the overlay named it. That is
    often a path of this namespace: a runtime mounts a container's overlays before it changes the container's root. So a
    layer counts if it lies below a mount point of the file system, here or in the overlay's namespace. An overlay that
    is older than the file system's mounts has what lay there before them.
    """
    ours = [each for each in places[os.getpid()] if each.device == mount.device]
    candidates = [
        (pid, each)
        for pid, there in places.items()
        for points in [{mounted.mountpoint for mounted in [*ours, *there] if mounted.device == mount.device}]
        for each in there
        if any(layer.is_relative_to(point) for layer in each.layers for point in points)
    ]
    return [(pid, each) for pid, each in candidates if not _is_older(pid, each, ours)]


def _is_older(pid: int, mount: Mount, others: Sequence[Mount]) -> bool:
    """Whether a mount in a process's namespace is older than all *others*, of this one; False if it is not known."""
    try:
        _in_child(partial(_check_younger, pid, mount, others))
    except OSError as error:
        return error.errno == errno.EALREADY
    return False


def _check_younger(pid: int, mount: Mount, others: Sequence[Mount]) -> None:
    """Raises OSError: EALREADY if the kernel gave the *others* their unique numbers, which only grow, after *mount*."""
    first = min(_unique_number("/proc/self/root", each) for each in others)
    if _unique_number(f"/proc/{pid}/root", mount) < first:
        raise OSError(errno.EALREADY, "older")


def _unique_number(root: str, mount: Mount) -> int:
    """The number that the kernel gives no other mount until it boots. Raises OSError; before Linux 6.8, ENOTSUP."""
    place = os.open(f"{root}{mount.mountpoint}", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{place}") as facts:
            _check_number(mount, facts.read())
        status = ctypes.create_string_buffer(256)
        flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC  # a server is not asked
        if _libc.statx(place, b"", flags, _STATX_MNT_ID_UNIQUE, status) != 0:
            raise OSError(ctypes.get_errno(), "statx")
    finally:
        os.close(place)
    if not _MASK.unpack_from(status)[0] & _STATX_MNT_ID_UNIQUE:
        raise OSError(errno.ENOTSUP, "statx")
    number: int = _MOUNT.unpack_from(status)[0]
    return number


def detach(pid: int, mount: Mount) -> None:
    """Unmount *mount* in the mount namespace of a process; open files stay open. Raises OSError.

    The owner of the namespace may change its paths meanwhile: this unmounts the mount of this number, or nothing.
    """
    _in_child(partial(_detach, pid, mount))


def _in_child(work: Callable[[], None]) -> None:
    """Do *work* in a child process, as a file system that hangs would block this one. Raises its OSError."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            work()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or errno.EIO)
        finally:
            os._exit(errno.EIO)
    process = os.pidfd_open(child)
    try:
        if not readable([process], TIMEOUT_S):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    finally:
        os.close(process)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, os.strerror(number))


def _detach(pid: int, mount: Mount) -> None:
    proc = os.open("/proc", _DIRECTORY)  # this namespace's, as the other one could have a false /proc
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    root = os.open(f"/proc/{pid}/root", _DIRECTORY)
    if _libc.setns(namespace, _CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.fchdir(root)
    os.chroot(".")
    place = os.open(mount.mountpoint, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.fchdir(proc)
    with open(f"self/fdinfo/{place}") as facts:
        _check_number(mount, facts.read())
    if _libc.umount2(f"self/fd/{place}".encode(), _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "umount2")


def _check_number(mount: Mount, facts: str) -> None:
    """Check, by what the kernel says of an open file, that it lies on *mount*. Raises OSError."""
    if f"mnt_id:\t{mount.number}" not in facts.splitlines():
        raise OSError(errno.ESTALE, "another mount is there by now")
