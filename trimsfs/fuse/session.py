"""A pyfuse3 session on a /dev/fuse descriptor that somebody else mounted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3
import trio

from trimsfs.filesystem import Filesystem
from trimsfs.fuse.operations import Operations
from trimsfs.options import MountOptions

MAX_TASKS = 1024
"""Requests being answered at once. Only requests that wait for the store take long, and each costs little."""


NUDGE_INTERVAL_S = 0.25
"""Longest that the event loop stands still for a request that was taken back."""


@contextmanager
def session(filesystem: Filesystem, options: MountOptions, descriptor: int) -> Iterator[trio.Event]:
    """Speak FUSE on *descriptor*; the mount itself is not this process's to undo.

    Gives an event that is set when the kernel and `serve` have agreed on the connection.
    """
    agreed = trio.Event()
    # libfuse takes /dev/fd/N for "already mounted, here is the connection".
    pyfuse3.init(Operations(filesystem, options, agreed), f"/dev/fd/{descriptor}", set())
    try:
        yield agreed
    finally:
        pyfuse3.close(unmount=False)


async def serve() -> None:
    """Answer requests until the file system is unmounted. For the main thread.

    pyfuse3 waits until there is a request and then reads it, blocking. When the process whose request it was is
    killed in between, the kernel takes the request back, and the read waits for another one and holds up the event
    loop and the GIL meanwhile. So a timer interrupts it: pyfuse3 takes that for nothing to read.
    """
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, NUDGE_INTERVAL_S, NUDGE_INTERVAL_S)
    try:
        await pyfuse3.main(min_tasks=4, max_tasks=MAX_TASKS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def invalidate(directory: int, name: bytes) -> None:
    """Have the kernel look a name up again. Returns at once: the kernel may make the notifier wait for requests."""
    pyfuse3.invalidate_entry_async(pyfuse3.InodeT(directory), pyfuse3.FileNameT(name), ignore_enoent=True)
