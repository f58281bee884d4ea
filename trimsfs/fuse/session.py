"""A FUSE session on a /dev/fuse descriptor that the keeper has mounted: serves, resumes, answers ioctls, notifies."""

import contextlib
import errno
import logging
import os
import struct
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVarTuple

import pyfuse3
import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import TrimsError
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.fuse import _libfuse
from trimsfs.fuse.errnos import errno_of
from trimsfs.fuse.operations import Operations
from trimsfs.handover.connection_settings import ConnectionSettings

log = logging.getLogger(__name__)

Ts = TypeVarTuple("Ts")

_RESEND = struct.pack("=IiQ", 16, 7, 0)
"""A ``struct fuse_out_header`` with the notification FUSE_NOTIFY_RESEND."""
_EXPIRE = struct.Struct("=IiQQII")
"""The same with FUSE_NOTIFY_INVAL_ENTRY, and a ``struct fuse_notify_inval_entry_out`` with FUSE_EXPIRE_ONLY; the name
follows."""
_PRUNE = struct.Struct("=IiQIIQ")
"""The same with FUSE_NOTIFY_PRUNE, and a ``struct fuse_notify_prune_out``; the numbers of inodes follow."""

MAX_TASKS = 8192
"""Most requests in flight: beyond them, opens of what is here wait as well. Only those that wait for the store take
long, and each costs little."""
MOST_DROPPING = 2
"""Most threads that drop pages: many closes at once must not take the threads that others need."""
READS_ON_S = 2.0
"""How long a program may go on reading what it was about to read when its pages became spare."""
MAX_BACKGROUND = 64
"""Most readahead requests of the kernel in flight: its default of 12 leaves a store with any latency idle."""


class Session:
    """Answers the kernel's requests with calls of a file system, once it is `on` a descriptor.

    *hide_threads* if the kernel numbers threads as in a PID namespace that this process does not see.
    """

    def __init__(self, settings: ConnectionSettings, *, hide_threads: bool) -> None:
        self._settings = settings
        self._hide_threads = hide_threads
        self._descriptor: int | None = None
        self._agreed = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._dropping = trio.CapacityLimiter(MOST_DROPPING)

    @contextmanager
    def on(self, descriptor: int, filesystem: Filesystem) -> Iterator[None]:
        """Speak FUSE on *descriptor*, for a file system, within the block. Only the keeper unmounts."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._filesystem = filesystem
        self._operations = Operations(filesystem, self._agreed)
        _libfuse.configure(
            passthrough=self._settings.passthrough,
            hide_threads=self._hide_threads,
            stack_depth=int(self._settings.overlay),
            max_background=MAX_BACKGROUND,
            on_lookup=self._operations.lookup_known,
            on_open=filesystem.files.open_resident,
            on_used=self._operations.used,
            on_ioctl=self._on_ioctl,
            on_interrupt=self._operations.interrupt,
            on_asked_again=filesystem.resent,
            on_offered=filesystem.handles.offered,
            on_opened=filesystem.files.delivered,
            on_release=filesystem.files.release,
            is_idle=self._operations.waiters.idle,
        )
        # libfuse reads /dev/fd/N as "already mounted, use this connection".
        pyfuse3.init(self._operations, f"/dev/fd/{descriptor}", set())
        assert _libfuse.connection()["interposed"]
        try:
            yield
        finally:
            pyfuse3.close(unmount=False)

    async def agreed(self) -> tuple["_libfuse._Connection", bytes]:
        """Wait until the kernel and `serve` have agreed on the connection; it, and the kernel's INIT message."""
        await self._agreed.wait()
        return _libfuse.connection(), _libfuse.init_message()

    def resume(self) -> None:
        """Take over an earlier server's connection: the kernel sends again what that server left unanswered."""
        assert self._descriptor is not None
        _libfuse.replay_init(bytes.fromhex(self._settings.init))
        os.write(self._descriptor, _RESEND)

    def expire(self, names: Iterable[tuple[int, bytes]]) -> None:
        """Make the kernel look names up again at their next use, each given after its directory's inode number.

        Call it in a worker thread: it waits for lookups in these directories. pyfuse3's call would make the kernel drop
        the names, and show files in use as deleted. (Before Linux 6.2, the kernel drops them anyway.)
        """
        assert self._descriptor is not None
        for directory, name in names:
            message = _EXPIRE.pack(_EXPIRE.size + len(name) + 1, 3, 0, directory, len(name), 1) + name + b"\0"
            with contextlib.suppress(OSError):  # the kernel does not know this one any more
                os.write(self._descriptor, message)

    def prune(self, numbers: Sequence[int]) -> None:
        """Let the kernel give up inodes that nothing uses; it sends a forget for each. Linux before 6.18 keeps them."""
        assert self._descriptor is not None
        message = _PRUNE.pack(_PRUNE.size + 8 * len(numbers), 9, 0, len(numbers), 0, 0) + array("Q", numbers).tobytes()
        with contextlib.suppress(OSError):
            os.write(self._descriptor, message)

    def drop_pages(self, number: int) -> None:
        """Have a worker thread make the kernel drop its pages of a file in cached mode, now and after READS_ON_S, while
        files are served."""
        if self._nursery is not None:
            self._nursery.start_soon(self._drop_pages, number)

    async def _drop_pages(self, number: int) -> None:
        drop = partial(in_thread, forget_pages, number, abandon_on_cancel=True, limiter=self._dropping)
        await drop()
        await trio.sleep(READS_ON_S)
        await drop()

    def waits(self) -> list[dict[str, object]]:
        """Which threads wait for which paths of the store, and for how long, as `Waiters.waits` tells it."""
        return self._operations.waiters.waits()

    async def serve(self) -> None:
        """Answer requests until the file system is unmounted. Call it in the main thread."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._operations.waiters.run)
            await pyfuse3.main(min_tasks=4, max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()

    def _on_ioctl(self, request: int, number: int, handle: int, uid: int, pid: int, command: int, data: bytes) -> bool:
        """Answer an ioctl, or start a task that does. Returns whether it is answered."""
        if self._nursery is None:
            _libfuse.reply_error(request, errno.ENOTTY)
        elif command == _libfuse.IOC_STATE:
            _libfuse.reply_ioctl(request, struct.pack("=I", self._filesystem.ioctls.state(handle)))
        elif command == _libfuse.IOC_CALLER:
            _libfuse.reply_ioctl(request, struct.pack("=I", uid))
        elif command == _libfuse.IOC_RESIDENCY:
            self._nursery.start_soon(self._answer, request, self._residency, number)
            return False
        elif self._filesystem.ioctls.known(command):
            self._nursery.start_soon(self._answer, request, self._of_extra, command, handle, uid, pid, data)
            return False
        else:
            _libfuse.reply_error(request, errno.ENOTTY)
        return True

    async def _answer(self, request: int, function: Callable[[*Ts], Awaitable[bytes]], *arguments: *Ts) -> None:
        try:
            _libfuse.reply_ioctl(request, await function(*arguments))
        except (TrimsError, InterruptedError) as error:
            _libfuse.reply_error(request, errno_of(error))
        except Exception:  # a defect: it ends this request, not the server
            log.exception("an ioctl failed")
            _libfuse.reply_error(request, errno.EIO)
        except BaseException:
            _libfuse.reply_error(request, errno.EIO)
            raise

    async def _residency(self, number: int) -> bytes:
        return struct.pack("=4Q", *await self._filesystem.ioctls.residency(number))

    async def _of_extra(self, command: int, handle: int, uid: int, pid: int, data: bytes) -> bytes:
        try:
            with self._operations.interruptible(pid):
                return await self._filesystem.ioctls.answer(command, handle, uid, pid, data)
        finally:
            self._operations.answered(pid)


def forget_attributes(numbers: Iterable[int]) -> None:
    """Make the kernel ask for the attributes of inodes again. Call it in a worker thread."""
    for number in numbers:
        with contextlib.suppress(OSError):  # the kernel does not know this one any more
            pyfuse3.invalidate_inode(pyfuse3.InodeT(number), attr_only=True)


def forget_pages(number: int) -> None:
    """Make the kernel read a file in cached mode again. Call it in a worker thread: it waits for reads in flight."""
    with contextlib.suppress(OSError):  # the kernel does not know this one any more
        pyfuse3.invalidate_inode(pyfuse3.InodeT(number), attr_only=False)


def why_no_passthrough() -> str:
    """Why the kernel and libfuse did not agree on passthrough, and the remedy."""
    if not _libfuse.PASSTHROUGH_BUILT:
        return f"libfuse {_libfuse.LIBFUSE} has no passthrough: install 3.17 or newer and rebuild trimsfs"
    return "this kernel has no FUSE passthrough: use Linux 6.9 or newer"


def invalidate(directory: int, name: bytes) -> None:
    """Make the kernel look a name up again. Returns at once: a thread waits for requests in flight, if need be."""
    pyfuse3.invalidate_entry_async(pyfuse3.InodeT(directory), pyfuse3.FileNameT(name), ignore_enoent=True)
