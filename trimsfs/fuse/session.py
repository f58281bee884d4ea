"""A pyfuse3 session on a /dev/fuse descriptor that somebody else mounted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3

from trimsfs.filesystem import Filesystem
from trimsfs.fuse.operations import Operations
from trimsfs.options import MountOptions

log = logging.getLogger(__name__)

MAX_TASKS = 1024
"""Requests being answered at once. Only requests that wait for the store take long, and each costs little."""


@contextmanager
def session(filesystem: Filesystem, options: MountOptions, descriptor: int) -> Iterator[None]:
    """Speak FUSE on *descriptor*; the mount itself is not this process's to undo."""
    # libfuse takes /dev/fd/N for "already mounted, here is the connection".
    pyfuse3.init(Operations(filesystem, options), f"/dev/fd/{descriptor}", set())
    try:
        yield
    finally:
        pyfuse3.close(unmount=False)


async def serve() -> None:
    """Answer requests until the file system is unmounted."""
    await pyfuse3.main(min_tasks=4, max_tasks=MAX_TASKS)


def invalidate(directory: int, name: bytes) -> None:
    """Have the kernel look a name up again. Returns at once: the kernel may make the notifier wait for requests."""
    pyfuse3.invalidate_entry_async(pyfuse3.InodeT(directory), pyfuse3.FileNameT(name), ignore_enoent=True)
