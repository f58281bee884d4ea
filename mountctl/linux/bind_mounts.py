"""The system calls of bind mounts, in any mount namespace. Each raises OSError."""

import ctypes
import fcntl
import os
import struct
from enum import IntFlag

# The numbers are the same on every architecture that Python runs Linux on, alpha aside.
_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442

_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_MNT_DETACH = 2
_NS_GET_USERNS = 0xB701

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000

MS_PRIVATE = 1 << 18
MS_SHARED = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class Resolve(IntFlag):
    """How openat2 resolves a path, of <linux/openat2.h>."""

    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10


def open_below(directory: int, path: str, flags: int, resolve: Resolve) -> int:
    """Open *path* below *directory* by openat2(2)."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return _call(_OPENAT2, directory, os.fsencode(path), how, len(how))


def clone(file: int) -> int:
    """A detached bind mount of the file or directory that *file* refers to."""
    return _call(_OPEN_TREE, file, b"", _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH)


def restrict(tree: int) -> None:
    """Make a mount ro, nosuid, nodev and private."""
    _set_attributes(tree, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, MS_PRIVATE)


def propagate(tree: int, propagation: int) -> None:
    """Set the mount propagation: MS_PRIVATE or MS_SHARED."""
    _set_attributes(tree, 0, propagation)


def move(tree: int, target: int) -> None:
    """Attach a detached mount at *target*, in the mount namespace of this process."""
    _call(_MOVE_MOUNT, tree, b"", target, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


def detach(path: str) -> None:
    """Unmount a path lazily."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "umount2")


def enter(namespace: int, kind: int) -> None:
    """Join a namespace; *kind* is CLONE_NEWNS or CLONE_NEWUSER."""
    if _libc.setns(namespace, kind) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def user_namespace_of(namespace: int) -> int:
    """The user namespace that a namespace belongs to."""
    return fcntl.ioctl(namespace, _NS_GET_USERNS)


def _set_attributes(tree: int, attributes: int, propagation: int) -> None:
    settings = struct.pack("=QQQQ", attributes, 0, propagation, 0)
    _call(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, settings, len(settings))


def _call(number: int, *arguments: int | bytes) -> int:
    values = [ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_long(value) for value in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *values)
    if result < 0:
        raise OSError(ctypes.get_errno(), "syscall")
    return result
