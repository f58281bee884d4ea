"""Where a file is: on a mount or not, on this host or still to be fetched."""

import fcntl
import io

_IOC_VERIFIED = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x71
"""As in ``trimsfs/fuse/trimsfs.h``."""
_PIECE = 8 << 20


def on_mount(file: io.FileIO) -> bool:
    """Whether an open file is one of a trimsfs mount, or of a bind mount of one, as in a container."""
    return _verified(file) is not None


def bring(file: io.FileIO) -> None:
    """Return when all of an open file is on this host. Raises OSError."""
    if _verified(file) is False:
        buffer = bytearray(_PIECE)
        while file.readinto(buffer):
            pass


def _verified(file: io.FileIO) -> bool | None:
    """Whether all of a file of a mount is here and has been checked; None of one that is on no mount."""
    answer = bytearray(4)
    try:
        fcntl.ioctl(file.fileno(), _IOC_VERIFIED, answer, True)
    except OSError:
        return None
    return any(answer)
