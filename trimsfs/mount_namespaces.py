"""Mount namespaces: lists the mounts in all of them, finds those that an unmount leaves, and unmounts them."""

import ctypes
import errno
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from trimsfs.mountinfo import Mount, mounts
from trimsfs.polling import readable

TIMEOUT_S = 5.0
"""Timeout of an unmount in another namespace, where file systems may hang."""
_CLONE_NEWNS, _MNT_DETACH = 0x00020000, 2
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


def namespaces() -> tuple[dict[int, list[Mount]], bool]:
    """All mounts of each mount namespace, by the pid of a process in it (this process's for its own).

    The second value tells whether this user may not look at some processes.
    """
    found = {os.getpid(): mounts(None)}
    known, hidden = {os.readlink("/proc/self/ns/mnt")}, False
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in known:
                found[pid] = mounts(None, process=pid)
                known.add(namespace)
        except PermissionError:
            hidden = True
        except (OSError, ValueError):
            pass  # it has ended
    return found, hidden


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


def detach(pid: int, mount: Mount) -> None:
    """Unmount *mount* in the mount namespace of a process; open files stay open. Raises OSError.

    The owner of the namespace may change its paths meanwhile: this unmounts the mount of this number, or nothing. A
    child process does it, as a file system that hangs would block this one.
    """
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _detach(pid, mount)
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
        if f"mnt_id:\t{mount.number}" not in facts.read().splitlines():
            raise OSError(errno.ESTALE, "another mount is there by now")
    if _libc.umount2(f"self/fd/{place}".encode(), _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "umount2")
