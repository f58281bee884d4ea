"""Binds a directory of a mount to a target, read-only; run as a child process, because the mount may not answer.

``python -m mountctl.csi.binding ORDER``, the order being JSON::

    {"mountpoint": "/mounts/models", "number": 40, "path": "resnet50", "target": "/...", "replace": false}

``number`` is the mount's in the kernel's table, "" as path is all of it, and with ``replace`` the present mount of the
target makes way. One line of JSON is printed: ``{}``, or ``{"stage": STAGE, "errno": NUMBER}`` with the stage that
failed: "mount", "path", "clone" or "target".

The path is resolved beneath the mount, without following links and without leaving it. The bind gets its attributes
while it is attached nowhere, and appears in one step: nobody ever sees it writable, and a process that is killed leaves
nothing half done. These calls need Linux 5.12; mount(2) can do neither.
"""

import ctypes
import json
import os
import struct
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mountctl import mounting

# System calls have these numbers on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442

_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_ATTRIBUTES = 1 | 2 | 4  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV
_MOVE_FROM_DESCRIPTOR, _MOVE_TO_DESCRIPTOR = 0x04, 0x40
_NO_OTHER_MOUNTS, _NO_LINKS, _BENEATH = 0x01, 0x02 | 0x04, 0x08

_libc = ctypes.CDLL(None, use_errno=True)


class StageError(Exception):
    """What could not be done, and the errno of it."""

    def __init__(self, stage: str, number: int) -> None:
        super().__init__(stage, number)
        self.stage, self.number = stage, number


def open_directory(path: Path) -> int:
    """An absolute path's directory, as a descriptor that only names it; without following any link. Raises OSError."""
    return _open_directory(None, str(path), _NO_LINKS)


def bind(order: dict[str, Any]) -> None:
    """Carry out an order. Raises StageError."""
    stage = "mount"
    with ExitStack() as opened:

        def keep(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        try:
            root = keep(_open_directory(None, order["mountpoint"], _NO_LINKS))
            if _mount_number(root) != order["number"]:
                raise StageError(stage, 0)
            stage = "path"
            source = keep(_open_directory(root, order["path"] or ".", _BENEATH | _NO_LINKS | _NO_OTHER_MOUNTS))
            stage = "clone"
            flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH)
            tree = keep(_call(_OPEN_TREE, source, b"", flags))
            attributes = struct.pack("=QQQQ", _ATTRIBUTES, 0, 0, 0)
            size = ctypes.c_size_t(len(attributes))
            _call(_MOUNT_SETATTR, tree, b"", ctypes.c_uint(_AT_EMPTY_PATH), attributes, size)
            stage = "target"
            if order["replace"]:
                mounting.unmount(Path(order["target"]), lazy=True)
            target = keep(open_directory(Path(order["target"])))
            flags = ctypes.c_uint(_MOVE_FROM_DESCRIPTOR | _MOVE_TO_DESCRIPTOR)
            _call(_MOVE_MOUNT, tree, b"", ctypes.c_int(target), b"", flags)
        except OSError as error:
            raise StageError(stage, error.errno or 0) from error


def _open_directory(at: int | None, path: str, resolve: int) -> int:
    how = struct.pack("=QQQ", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, resolve)
    return _call(_OPENAT2, -100 if at is None else at, os.fsencode(path), how, ctypes.c_size_t(len(how)))


def _call(number: int, descriptor: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), ctypes.c_int(descriptor), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _mount_number(descriptor: int) -> int:
    """The number of the mount that a descriptor is on."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("mnt_id:")).split()[1])


def main() -> None:
    """Entry point of the child process."""
    try:
        bind(json.loads(sys.argv[1]))
    except StageError as error:
        print(json.dumps({"stage": error.stage, "errno": error.number}))
    else:
        print("{}")


if __name__ == "__main__":
    main()
