"""Where a file is: on a mount or not, on this host or still to be fetched."""

import fcntl
import io
import sys

_IOC_STATE = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x71
_VERIFIED, _COMMON = 1, 8
"""As in ``trimsfs/fuse/trimsfs.h``."""
_PIECE = 8 << 20


def on_mount(file: io.FileIO) -> bool:
    """Whether an open file is one of a trimsfs mount, or of a bind mount of one, as in a container."""
    return _state(file) is not None


def bring(file: io.FileIO) -> bool:
    """Return when all of an open file is on this host; whether the mount tells what it has in common with others.

    Raises OSError.
    """
    state = _state(file)
    if state is None:
        return False
    if not state & _VERIFIED:
        buffer = bytearray(_PIECE)
        while file.readinto(buffer):
            pass
    return bool(state & _COMMON)


def _state(file: io.FileIO) -> int | None:
    """Flags of a file of a mount; None of one that is on no mount."""
    answer = bytearray(4)
    try:
        fcntl.ioctl(file.fileno(), _IOC_STATE, answer, True)
    except OSError:
        return None
    return int.from_bytes(answer, sys.byteorder)
