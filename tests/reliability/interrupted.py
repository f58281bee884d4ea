"""System calls on a mount while signals come all the time: ``python interrupted.py FILE DIRECTORY RESTART``.

The handler is installed with SA_RESTART if RESTART is ``yes``. Told as JSON: how often each call failed with EINTR and
was made again, how often a read was short, how many signals came, and the SHA-256 of what was read. Calls are made by
ctypes, as Python's own hide EINTR.
"""

import ctypes
import errno
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable

PIECE = 1 << 20
SIGNALS_EVERY_S = 0.003
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
LIBC.getdents64.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
LIBC.pread.restype = LIBC.getdents64.restype = ctypes.c_long


interrupted: Counter[str] = Counter()


def make(name: str, call: Callable[[], int]) -> int:
    """Make a call, again and again while a signal interrupts it."""
    while (result := call()) < 0:
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
        interrupted[name] += 1
    return result


def main() -> None:
    file, directory, restart = sys.argv[1].encode(), sys.argv[2].encode(), sys.argv[3] == "yes"
    signals = 0

    def handle(*_: object) -> None:
        nonlocal signals
        signals += 1

    signal.signal(signal.SIGALRM, handle)
    signal.siginterrupt(signal.SIGALRM, not restart)
    signal.setitimer(signal.ITIMER_REAL, SIGNALS_EVERY_S, SIGNALS_EVERY_S)
    buffer, short = ctypes.create_string_buffer(PIECE), 0
    make("access", lambda: LIBC.access(directory, os.R_OK))
    listing = make("opendir", lambda: LIBC.open(directory, os.O_RDONLY | os.O_DIRECTORY))
    while make("getdents", lambda: LIBC.getdents64(listing, buffer, PIECE)):
        pass
    descriptor = make("open", lambda: LIBC.open(file, os.O_RDONLY))
    size, done, digest = os.fstat(descriptor).st_size, 0, hashlib.sha256()
    while done < size:
        count = make("read", lambda: LIBC.pread(descriptor, buffer, PIECE, done))  # noqa: B023
        short += count < min(PIECE, size - done)
        digest.update(buffer.raw[:count])
        done += count
    signal.setitimer(signal.ITIMER_REAL, 0)
    told = {"interrupted": interrupted, "short": short, "signals": signals, "digest": digest.hexdigest()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
