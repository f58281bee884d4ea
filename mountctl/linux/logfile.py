"""The log of a background mount: one file that the keeper and its servers append to, and the keeper rotates."""

import contextlib
import errno
import os
import stat
from pathlib import Path

SIZE_LIMIT = 16 << 20
_PIECE = 1 << 20


def append_output_to(path: Path) -> None:
    """Append the output of this process and its children to a log.

    Raises OSError, also if another user could have placed the log.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "another user could have placed it", str(path))
        for standard in (1, 2):
            os.dup2(descriptor, standard)
    finally:
        os.close(descriptor)


def rotate(descriptor: int, path: Path) -> None:
    """Move the content of a log above SIZE_LIMIT to ``PATH.1``.

    This truncates the file instead of replacing it, as its writers keep their descriptors and append. Lines written
    meanwhile may be lost. Raises OSError, and leaves both files, if there is no room.
    """
    if os.fstat(descriptor).st_size <= SIZE_LIMIT:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    new = path.with_name(f"{path.name}.new")
    try:
        with os.fdopen(os.open(new, flags, 0o600), "wb") as copy:
            offset = 0
            while offset <= 2 * SIZE_LIMIT and (piece := os.pread(descriptor, _PIECE, offset)):
                copy.write(piece)
                offset += len(piece)
        os.replace(new, path.with_name(f"{path.name}.1"))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    os.ftruncate(descriptor, 0)
