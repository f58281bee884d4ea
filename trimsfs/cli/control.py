"""Finding and reading the control files of a mount."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimsfs.errors import (
    NoSuchEntryError,
    NotMountedError,
    NotPermittedError,
    StoreUnavailableError,
    TrimsError,
)
from trimsfs.mountinfo import Mount, mount_of, mounts


def mount_of_path(path: Path) -> Mount:
    """The mount that a path lies on. Raises NotMountedError."""
    mount = mount_of(Path(os.path.realpath(path)))
    if mount is None:
        raise NotMountedError(f"{path} is not on a trimsfs mount")
    return mount


def control_directory(path: Path) -> Path:
    """The directory with the control files about a file or directory. Raises NotMountedError, NoSuchEntryError."""
    path = Path(os.path.realpath(path))
    mount_of_path(path)
    try:
        directory = path.is_dir()
        if not directory:
            path.stat()
    except OSError as error:
        raise translated(error, path) from error
    return path / ".trims/.trims" if directory else path.parent / ".trims" / path.name


def read_json(path: Path) -> dict[str, Any]:
    """What a control file says."""
    return next(read_lines(path))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a command's control file as they come. Closing the iterator ends the command."""
    try:
        with path.open("rb", buffering=0) as file:
            text = b""
            while piece := file.read(1 << 20):
                *lines, text = (text + piece).split(b"\n")
                yield from map(json.loads, lines)
    except OSError as error:
        raise translated(error, path) from error


def read_text(path: Path) -> str:
    """The text of a control file."""
    try:
        return path.read_text()
    except OSError as error:
        raise translated(error, path) from error


def all_mounts() -> list[Mount]:
    """The trimsfs mounts of this host, those of containers excepted."""
    return mounts()


def translated(error: OSError, path: Path) -> TrimsError:
    """What an error of a path on a mount means."""
    message = f"{path}: {error.strerror}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NoSuchEntryError(message)
        case errno.EPERM | errno.EACCES:
            return NotPermittedError(f"{message}: only root, the owner of the mount and its --control-gid may do this")
        case errno.ENOTCONN:
            return NotMountedError(f"{message}: its server is gone; unmount it with `trimsfs umount --lazy`")
        case _:
            return StoreUnavailableError(f"{message}: see the log of the mount")
