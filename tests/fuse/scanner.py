"""An on-access scanner: the kernel asks it about each open below a mount, and opens the file for it first.

Reads the beginning of each file and allows the open. Prints ``ready``, and how many files it has seen once its standard
input ends.
"""

import ctypes
import os
import select
import struct
import sys
from contextlib import suppress

_FAN_CLASS_CONTENT, _FAN_NONBLOCK = 0x4, 0x2
_FAN_MARK_ADD, _FAN_MARK_MOUNT = 0x1, 0x10
_FAN_OPEN_PERM, _FAN_ALLOW = 0x10000, 1
_AT_FDCWD = -100
_EVENT, _RESPONSE = struct.Struct("=IBBHQii"), struct.Struct("=iI")
HEAD = 4096

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main(mountpoint: str) -> None:
    """Scan until standard input ends."""
    group = _checked(_libc.fanotify_init(_FAN_CLASS_CONTENT | _FAN_NONBLOCK, os.O_RDONLY | os.O_CLOEXEC))
    flags, mask = _FAN_MARK_ADD | _FAN_MARK_MOUNT, ctypes.c_uint64(_FAN_OPEN_PERM)
    _checked(_libc.fanotify_mark(group, flags, mask, _AT_FDCWD, os.fsencode(mountpoint)))
    print("ready", flush=True)
    seen = 0
    poll = select.poll()
    poll.register(group, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if group in ready:
            events = os.read(group, 4096)
            while events:
                length, _, _, _, _, descriptor, _ = _EVENT.unpack_from(events)
                with suppress(OSError):  # as scanners do with what they cannot read
                    os.pread(descriptor, HEAD, 0)
                os.write(group, _RESPONSE.pack(descriptor, _FAN_ALLOW))
                os.close(descriptor)
                seen += 1
                events = events[length:]
        elif 0 in ready:
            print(seen, flush=True)
            return


if __name__ == "__main__":
    main(sys.argv[1])
