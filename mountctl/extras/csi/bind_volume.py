"""Bind-mounts a directory of a mount at a target, read-only; runs in a child process, because the mount may hang.

``python -m mountctl.extras.csi.bind_volume ORDER``, where the order is JSON::

    {"mountpoint": "/mounts/models", "number": 40, "path": "resnet50", "target": "/...", "replace": false}

``number`` is the mount id, the path "" is the whole mount, and ``replace`` first unmounts the mount at the target. The
process prints one line of JSON: ``{}``, or ``{"stage": STAGE, "errno": NUMBER}`` with the stage that failed: "mount",
"path", "clone" or "target".

The kernel resolves the path beneath the mount, and follows no symbolic link. The driver names the version that an alias
leads to, which it has checked. The bind mount is read-only before it is attached, and appears in one step. So nobody
ever sees it writable, and a killed process leaves nothing half done. These system calls need Linux 5.12; mount(2) can
do neither.
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


class BindError(Exception):
    """A stage failed: its name, and the errno value, or 0 if no system call failed."""

    def __init__(self, stage: str, number: int) -> None:
        super().__init__(stage, number)
        self.stage, self.number = stage, number


def open_directory(path: Path) -> int:
    """Open a directory by its absolute path, as O_PATH, without following symbolic links. Raises OSError."""
    return bind_mounts.open_below(_HERE, str(path), _DIRECTORY, _NO_LINKS)


def bind(order: dict[str, Any]) -> None:
    """Make the bind mount of an order. Raises BindError."""
    stage = "mount"
    with ExitStack() as descriptors:

        def keep(descriptor: int) -> int:
            descriptors.callback(os.close, descriptor)
            return descriptor

        try:
            root = keep(open_directory(Path(order["mountpoint"])))
            if _mount_id(root) != order["number"]:
                raise BindError(stage, 0)
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
            raise BindError(stage, error.errno or 0) from error


def _mount_id(descriptor: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("mnt_id:")).split()[1])


def main() -> None:
    try:
        bind(json.loads(sys.argv[1]))
    except BindError as error:
        print(json.dumps({"stage": error.stage, "errno": error.number}))
    else:
        print("{}")


if __name__ == "__main__":
    main()
