"""FUSE requests as calls of the filesystem: translates types and errors, and decides nothing."""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from trimsfs.control.authorisation import Caller
from trimsfs.errors import NoSuchEntryError, NotPermittedError, StaleHandleError, TrimsError
from trimsfs.filesystem.attributes import FOREVER_S, Attributes
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.fuse import _libfuse
from trimsfs.fuse.errnos import errno_of
from trimsfs.fuse.failed_reads import FailedReads
from trimsfs.fuse.waiters import Waiters, signalled
from trimsfs.namespace.inodes import IN_THE_STORE

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

BLOCK_SIZE = 4096
READ_SIZE = 128 * 1024
"""The ``st_blksize``: the read size of programs that heed it."""

NAME_ONLY_BIT = 1 << 63
"""Set in the number of a listed name whose inode the kernel does not get."""
LISTED_AT_ONCE = 50
"""Names of a listing between two pauses for other requests."""

_EXPECTED = (NoSuchEntryError, NotPermittedError, StaleHandleError, InterruptedError)
"""Errors of normal work, which are not logged."""


def _translated(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    @functools.wraps(function)
    async def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return await function(*arguments, **named)
        except pyfuse3.FUSEError:
            raise
        except (TrimsError, IsADirectoryError, InterruptedError) as error:
            number = errno_of(error)
            if not isinstance(error, _EXPECTED):
                log.warning("%s: %s: %s", function.__name__, os.strerror(number), error)
            raise pyfuse3.FUSEError(number) from error
        except Exception as error:
            log.exception("%s failed", function.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return call


class Operations(pyfuse3.Operations):
    """The requests that a read-only file system gets; the kernel itself answers EROFS to those that would write."""

    supports_dot_lookup = False

    def __init__(self, filesystem: Filesystem, agreed: trio.Event) -> None:
        super().__init__()
        self._agreed = agreed
        self._filesystem = filesystem
        self.waiters = Waiters(self._look_for_signals)
        self._failed_reads = FailedReads()
        self._waiting: dict[int, trio.CancelScope] = {}
        self._interrupted: set[int] = set()
        self._unexplained: set[int] = set()
        """Threads with an interrupt for which no signal was found yet."""

    def init(self) -> None:
        # Tasks that wait for this run after libfuse has answered the kernel's INIT.
        self._agreed.set()

    @_translated
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        with self.waiters.waiting(ctx.pid, partial(self._path, parent_inode, name)):
            attributes = await self._filesystem.names.lookup(parent_inode, name, thread=ctx.pid)
        self._filesystem.names.count_lookup(attributes)
        return self._entry(attributes)

    def lookup_known(self, directory: int, name: bytes, thread: int) -> "_libfuse._Entry | None":
        """`lookup` without waiting: what the kernel gets of a name; None if that is not known at once."""
        attributes = self._filesystem.names.lookup_known(directory, name, thread=thread)
        if attributes is None:
            return None
        self._filesystem.names.count_lookup(attributes)
        ownership = attributes.ownership
        return (
            attributes.inode.number,
            attributes.entry_ttl_s,
            FOREVER_S,
            attributes.mode,
            ownership.uid,
            ownership.gid,
            attributes.size,
            READ_SIZE,
            attributes.modified_ns,
        )

    def used(self, handle: int, thread: int, uid: int, gid: int) -> None:
        """Complete an open that was answered at once: a thread has got the handle."""
        self._filesystem.files.used(handle, thread, partial(_caller_of, uid, gid, thread))

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for number, lookups in inode_list:
            self._filesystem.names.inodes.forget(number, lookups)

    @_translated
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._filesystem.names.attributes(inode))

    @_translated
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        with self.waiters.waiting(ctx.pid, partial(self._path, inode)):
            return pyfuse3.FileNameT(await self._filesystem.names.follow(inode, thread=ctx.pid))
        raise AssertionError("unreachable: a killed thread's request raises")

    @_translated
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        with self.waiters.waiting(ctx.pid):
            return pyfuse3.FileHandleT(await self._filesystem.open_directory(inode, partial(_caller, ctx)))
        raise AssertionError("unreachable: a killed thread's request raises")

    @_translated
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        with self.waiters.waiting(_libfuse.thread()):  # after a takeover, it may have to list the directory anew
            entries = await self._filesystem.names.list_directory(fh, start_id)
        # Not to be interrupted: the kernel would forget none of the inodes that were counted.
        for name, attributes, position in entries:
            entry = self._entry(attributes)
            counted = self._filesystem.names.may_be_counted(attributes)
            if not counted:
                entry.st_ino = pyfuse3.InodeT(entry.st_ino | NAME_ONLY_BIT)
            fits = pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, position)
            if fits and counted:
                self._filesystem.names.count_lookup(attributes)
            else:
                self._filesystem.names.inodes.discard(attributes.inode)
            if not fits:
                break
            if position % LISTED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._filesystem.files.release(fh)

    @_translated
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        try:
            with self.waiters.waiting(ctx.pid, partial(self._path, inode)):
                reply = await self._filesystem.files.open(
                    inode, partial(_caller, ctx), partial(self.interruptible, ctx.pid), thread=ctx.pid
                )
        finally:
            self.answered(ctx.pid)
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(reply.handle), keep_cache=reply.keep_cache, direct_io=reply.direct_io
        )

    @contextmanager
    def interruptible(self, thread: int) -> Iterator[None]:
        """A block that a signal to *thread* ends with InterruptedError; 0, in another PID namespace, gets none."""
        if thread == 0:
            yield
            return
        with trio.CancelScope() as scope:
            self._waiting[thread] = scope
            if thread in self._interrupted:
                scope.cancel()
            try:
                yield
            finally:
                del self._waiting[thread]
        if scope.cancelled_caught:
            raise InterruptedError

    def answered(self, thread: int) -> None:
        """Record that a thread's request is answered: later signals end no block."""
        self._interrupted.discard(thread)
        self._unexplained.discard(thread)

    def interrupt(self, thread: int) -> None:
        """End the block that a thread waits in, or is about to enter, once a signal for the program came."""
        if not signalled(thread):
            self._unexplained.add(thread)
            return
        self._interrupted.add(thread)
        scope = self._waiting.get(thread)
        if scope is not None:
            scope.cancel()

    def _look_for_signals(self) -> None:
        for thread in list(self._unexplained):
            self._unexplained.discard(thread)
            self.interrupt(thread)

    @_translated
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        thread = _libfuse.thread()
        try:
            with self.waiters.waiting(thread, partial(self._filesystem.files.path, fh)):
                # pyfuse3 takes any buffer, despite its annotation.
                return await self._filesystem.files.read(fh, off, size)  # type: ignore[return-value]
        except TrimsError as error:
            path = self._filesystem.files.path(fh)
            if path is None or isinstance(error, _EXPECTED):
                raise
            self._failed_reads.tell(thread, path, error)
            raise pyfuse3.FUSEError(errno_of(error)) from error
        raise AssertionError("unreachable: an ended thread's request raises")

    @_translated
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        with self.waiters.waiting(ctx.pid):
            value = await self._filesystem.xattr(inode, os.fsdecode(name), partial(_caller, ctx))
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @_translated
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        return [pyfuse3.XAttrNameT(os.fsencode(name)) for name in self._filesystem.xattr_names(inode)]

    @_translated
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        total, free = self._filesystem.space()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_SIZE
        data.f_blocks = total // BLOCK_SIZE
        data.f_bfree = data.f_bavail = free // BLOCK_SIZE
        data.f_files = self._filesystem.known_files()
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    def _path(self, number: int, name: bytes = b"") -> str | None:
        """The path of a file or directory in the store, or of a name in it; None of other inodes."""
        inode = self._filesystem.names.inodes.get(number)
        return inode.path + os.fsdecode(name) if inode is not None and inode.kind in IN_THE_STORE else None

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(attributes.inode.number)
        entry.generation = 0
        entry.entry_timeout = attributes.entry_ttl_s
        entry.attr_timeout = FOREVER_S
        ownership = attributes.ownership
        entry.st_mode = pyfuse3.ModeT(attributes.mode)
        entry.st_nlink = 1
        entry.st_uid = ownership.uid
        entry.st_gid = ownership.gid
        entry.st_rdev = 0
        entry.st_size = attributes.size
        entry.st_blksize = READ_SIZE
        entry.st_blocks = -(-attributes.size // 512)
        entry.st_atime_ns = entry.st_ctime_ns = entry.st_mtime_ns = attributes.modified_ns
        return entry


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return _caller_of(ctx.uid, ctx.gid, ctx.pid)


def _caller_of(uid: int, gid: int, thread: int) -> Caller:
    try:
        groups = pyfuse3.get_sup_groups(thread)
    except (OSError, RuntimeError, ValueError):
        groups = set()  # the process has ended, is in another PID namespace, or has a name that is not text
    return Caller(uid=uid, groups=frozenset({gid, *groups}), pid=thread)
