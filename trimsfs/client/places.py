"""Where a file is: on a mount or not, on this host or still to be fetched."""

import fcntl
import os
import struct

from trimsfs.mountinfo import mounts

_RESIDENCY = struct.Struct("=QQQQ")
_IOC_RESIDENCY = 2 << 30 | _RESIDENCY.size << 16 | ord("t") << 8 | 0x70
_VERIFIED = 1
"""As in ``trimsfs/fuse/trimsfs.h``."""
_PIECE = 8 << 20


def on_mount(path: str | os.PathLike[str]) -> bool:
    """Whether a file lies on a trimsfs mount, or on a bind mount of one, as in a container. Asks no server."""
    try:
        device = os.stat(path).st_dev
        return any(mount.device == f"{os.major(device)}:{os.minor(device)}" for mount in mounts())
    except OSError:
        return False


def bring(path: str | os.PathLike[str]) -> None:
    """Return when all of a file is on this host. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        if not _is_here(file.fileno()):
            buffer = bytearray(_PIECE)
            while file.readinto(buffer):
                pass


def _is_here(descriptor: int) -> bool:
    try:
        answer = fcntl.ioctl(descriptor, _IOC_RESIDENCY, bytes(_RESIDENCY.size))
    except OSError:
        return True  # no file of a mount, or of an older one
    *_, flags = _RESIDENCY.unpack(answer)
    return bool(flags & _VERIFIED)
