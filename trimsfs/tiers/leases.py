"""Leases: the kernel grants one only on a file that nobody else has open, so they find mappings of a closed file."""

import errno
import fcntl


def has_other_openers(descriptor: int) -> bool:
    """Whether a file is open or mapped, other than by this descriptor, which must allow writing.

    FUSE files that the kernel passes through to it count too. False where the file system has no leases. Ignore SIGIO:
    the kernel sends it if somebody opens the file during the call.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
