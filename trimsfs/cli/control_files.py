"""Finds and reads the control files of a mount."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimsfs.errors import (
    NoSuchEntryError,
    NotMountedError,
    NotPermittedError,
    ObjectChangedError,
    StoreAccessError,
    StoreUnavailableError,
    TrimsError,
)
from trimsfs.mountinfo import Mount, mount_of

ANSWER_TIMEOUT_S = 10.0


def mount_of_path(path: Path) -> Mount:
    """The mount that a path lies on, checked to answer. Raises NotMountedError."""
    for candidate in (os.path.abspath, os.path.realpath):
        # abspath comes first: it does not touch a mount that may hang.
        mount = mount_of(Path(candidate(path)))
        if mount is not None:
            check_answers(mount.mountpoint)
            return mount
    raise NotMountedError(f"{path} is not on a trimsfs mount")


def check_answers(mountpoint: Path) -> None:
    """Check that a mount answers. Raises NotMountedError when it does not in ANSWER_TIMEOUT_S."""
    # In a child process: one that waits for a hanging mount cannot be killed.
    process = subprocess.Popen(
        ["stat", "-f", "--", mountpoint],
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, message = process.communicate(timeout=ANSWER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise NotMountedError(f"{mountpoint} does not answer: see its log, or `mountctl abort {mountpoint}`") from None
    if process.returncode != 0:
        cause = message.strip().rpartition(": ")[2]
        if cause == "Permission denied":
            raise NotPermittedError(f"{mountpoint}: {cause}: it is another user's mount")
        raise NotMountedError(f"{mountpoint}: {cause}: its server is gone: unmount it with `trimsfs umount`")


def control_directory(path: Path) -> Path:
    """The directory with the control files of a file or directory. Raises NotMountedError, NoSuchEntryError."""
    mount_of_path(path)
    path = Path(os.path.realpath(path))
    try:
        directory = path.is_dir()
        if not directory:
            path.stat()
    except OSError as error:
        raise translated(error, path) from error
    return path / ".trims/.trims" if directory else path.parent / ".trims" / path.name


def read_json(path: Path) -> dict[str, Any]:
    """The first line of a control file, parsed."""
    return next(read_lines(path))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a command's control file as they arrive. Closing the iterator cancels the command."""
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


def translated(error: OSError, path: Path) -> TrimsError:
    """The TrimsError for an OSError of a path on a mount."""
    message = f"{path}: {error.strerror}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NoSuchEntryError(message)
        case errno.EPERM:
            return NotPermittedError(f"{message}: only root, the owner of the mount and its --control-gid may do this")
        case errno.EACCES:
            return StoreAccessError(f"{message}: by the mode of the mount, or the store's credentials: see its log")
        case errno.ESTALE:
            return ObjectChangedError(f"{message}: replaced or deleted in the store: try again")
        case errno.ENOTCONN:
            return NotMountedError(f"{message}: its server is gone: unmount it with `trimsfs umount`")
        case _:
            return StoreUnavailableError(f"{message}: see the log of the mount")
