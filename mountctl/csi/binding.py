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

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mountctl.linux import bind_mounts, mounting
from mountctl.linux.bind_mounts import Resolve

_CLOSED = Resolve.NO_XDEV | Resolve.NO_MAGICLINKS | Resolve.NO_SYMLINKS | Resolve.BENEATH
_NO_LINKS = Resolve.NO_MAGICLINKS | Resolve.NO_SYMLINKS
_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_HERE = -100


class StageError(Exception):
    """What could not be done, and the errno of it."""

    def __init__(self, stage: str, number: int) -> None:
        super().__init__(stage, number)
        self.stage, self.number = stage, number


def open_directory(path: Path) -> int:
    """An absolute path's directory, as a descriptor that only names it; without following any link. Raises OSError."""
    return bind_mounts.open_below(_HERE, str(path), _DIRECTORY, _NO_LINKS)


def bind(order: dict[str, Any]) -> None:
    """Carry out an order. Raises StageError."""
    stage = "mount"
    with ExitStack() as opened:

        def keep(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        try:
            root = keep(open_directory(Path(order["mountpoint"])))
            if _mount_number(root) != order["number"]:
                raise StageError(stage, 0)
            stage = "path"
            source = keep(bind_mounts.open_below(root, order["path"] or ".", _DIRECTORY, _CLOSED))
            stage = "clone"
            tree = keep(bind_mounts.clone(source))
            bind_mounts.restrict(tree)
            stage = "target"
            if order["replace"]:
                mounting.unmount(Path(order["target"]), lazy=True)
            target = keep(open_directory(Path(order["target"])))
            bind_mounts.move(tree, target)
        except OSError as error:
            raise StageError(stage, error.errno or 0) from error


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
