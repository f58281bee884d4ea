"""Files: open, read and release, for model files and control files."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from cachetools import LRUCache

from trimsfs.control.authorisation import Caller, readable_by
from trimsfs.control.control_files import Control
from trimsfs.errors import ObjectChangedError, SignatureError, StaleHandleError, StoreAccessError
from trimsfs.fetch.bypass import AccessPattern, new_ends
from trimsfs.filesystem.handles import BACKING_SHIFT, Handles, OpenFile, passed_through
from trimsfs.filesystem.ioctls import Ioctls
from trimsfs.filesystem.names import Names
from trimsfs.filesystem.trust import Trust
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.opening.cold_open import Interruptible
from trimsfs.opening.opener import Opener
from trimsfs.prefetch.prefetcher import Prefetcher
from trimsfs.telemetry.model_counters import Counts
from trimsfs.telemetry.open_trace import OpenTrace, Why
from trimsfs.telemetry.tracer import Tracer
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import FileOpens
from trimsfs.types import Buffer, Generation

WEIGHTS = (
    *(".bin", ".ckpt", ".ggml", ".gguf", ".msgpack", ".npy", ".npz", ".onnx_data", ".params", ".pdparams", ".pt"),
    *(".pth", ".safetensors"),
)
"""Suffixes of files that programs read in large pieces, or map. Others, such as databases and protocol buffers, they
read in small pieces, perhaps again and again: those need the kernel's pages."""
MOST_SPARE = 1024
"""Most handles made in advance, each for the next open of a file."""
MOST_REFUSALS = 1024
"""Most files of which the last refusal is remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenReply:
    """The answer to an open: the handle, and two flags as in ``fuse_open_out``.

    With ``keep_cache``, the kernel keeps the file's pages, also those of earlier opens. With ``direct_io``, it passes
    on every read. If the upper half of the handle is a backing id, the kernel reads the local file by itself.
    """

    handle: int
    keep_cache: bool
    direct_io: bool


class Files:
    """Opens, reads and closes files. ``reads`` and ``read_bytes`` count since the server started.

    With ``direct``, the kernel passes every read of weights on that are still fetched, and keeps no pages of them.
    Pages would be a second copy in memory, and cost more than the reads. Mappings have pages. Of several programs at
    once, only the first reads so: the kernel answers the others from its pages.
    """

    def __init__(
        self,
        names: Names,
        blobs: FileOpens,
        control: Control,
        prefetcher: Prefetcher,
        opener: Opener,
        trust: Trust,
        handles: Handles,
        ioctls: Ioctls,
        tracer: Tracer,
        drop_pages: Callable[[int], None],
    ) -> None:
        self._tracer = tracer
        self._drop_pages = drop_pages
        self._names = names
        self._blobs = blobs
        self._control = control
        self._prefetcher = prefetcher
        self._opener = opener
        self._trust = trust
        self._handles = handles
        self._ioctls = ioctls
        self._ends = WeakValueDictionary[str, deque[int]]()
        """Where recent reads of each open file have ended, by the tokens of blobs: all its readers go on from there."""
        self._resident_seconds = tracer.open_seconds.series("resident")
        self._spare: dict[int, tuple[int, Blob, Counts]] = {}
        """Handles for the next opens of passed-through files, with their blobs and counts, by inode number."""
        self._resident: dict[int, tuple[Inode, Blob, Counts | None, float]] = {}
        """Opens that `open_resident` answers, with their instants, by handle, until the kernel has it."""
        self._refusals = LRUCache[str, str](MOST_REFUSALS)
        """Why the last open or read of a file was refused, by path."""
        self.reads = self.read_bytes = 0
        self.direct = False

    async def open(
        self, number: int, caller: Callable[[], Caller], interruptible: Interruptible, *, thread: int = 0
    ) -> OpenReply:
        """Open a file for reading, for a *thread*.

        Raises ObjectChangedError when the store has replaced it, and StaleHandleError when its name leads to another
        inode from now on. Raises InterruptedError when a signal ends the wait.
        """
        inode = self._names.inodes[number]
        if inode.kind is InodeKind.CONTROL_FILE:
            return await self._open_control(inode, caller, interruptible)
        if inode.generation is None:
            raise IsADirectoryError(inode.path)
        with self._noting_refusals(inode):
            return await self._open_model(inode, inode.generation, caller, interruptible, thread)
        raise AssertionError("unreachable: a refusal raises")

    @contextmanager
    def _noting_refusals(self, inode: Inode) -> Iterator[None]:
        """Note why the block may not read a file; if it may, forget it."""
        try:
            yield
        except (StoreAccessError, SignatureError) as error:
            self._refusals[inode.path] = str(error)
            raise
        else:
            self._refusals.pop(inode.path, None)

    def refusal(self, inode: Inode) -> str | None:
        """Why the store's credentials or a signature denied the last open or read of a file; None if they did not."""
        return self._refusals.get(inode.path)

    async def _open_model(
        self,
        inode: Inode,
        generation: Generation,
        caller: Callable[[], Caller],
        interruptible: Interruptible,
        thread: int,
    ) -> OpenReply:
        try:
            await self._trust.check(generation, interruptible)
        except ObjectChangedError:
            self._look_up_again(inode, thread)
            raise
        trace = self._tracer.begin(thread, inode.path)
        with trace.spanning("index"):
            blob = await self._blobs.acquire(generation, opening=True)
        self._tracer.about(trace, self._why(blob), generation.size, blob)
        self._prefetcher.record_open(blob, readable_by(self._control.authorisation, caller))
        try:
            await self._trust.admit(blob, interruptible)
            passed = await self._opener.open(inode, blob, interruptible, thread)
        except BaseException as error:
            self._prefetcher.open_failed(blob)
            self._blobs.release(blob)
            if isinstance(error, ObjectChangedError):
                self._look_up_again(inode, thread)
            self._end(trace, error)
            raise
        reopened = self._opener.reopens.expected(thread, inode.path)
        self._prefetcher.opened(blob)
        file = OpenFile(inode, blob, thread, thread if reopened else None)
        handle = self._handles.add_file(file, passed=passed)
        if self._tracer.answered(trace, streams=not blob.complete):
            file.trace = trace
        # A reader alone with an incomplete blob reads it through the server. Pages that the kernel kept of an evicted
        # copy would hide its reads, and the blob would stay incomplete.
        alone = blob.handles == 1
        keeps = blob.complete or not alone
        direct = not passed and self.direct and alone and not blob.complete and inode.path.endswith(WEIGHTS)
        return OpenReply(handle=handle, keep_cache=keeps, direct_io=direct)

    def _look_up_again(self, inode: Inode, thread: int) -> None:
        """The store has another content: the ESTALE of the open makes the kernel reopen."""
        self._opener.reopens.request(thread, inode.path)
        self._names.replaced(inode)

    def _why(self, blob: Blob) -> Why:
        """What an open of a blob is about to wait for."""
        if self._opener.passthrough.resident(blob):
            return "resident"
        if blob.missing_bytes:
            return "store"
        return "disk" if blob.complete and blob.health.compared else "verification"

    def _end(self, trace: OpenTrace, error: BaseException) -> None:
        """An open is answered with an error, perhaps with ESTALE: then the kernel goes on with it."""
        if isinstance(error, StaleHandleError | ObjectChangedError):
            self._tracer.look_up_again(trace)
        else:
            self._tracer.failed(trace, error)

    def open_resident(self, number: int, request: int) -> int | None:
        """`open` in passthrough mode without waiting: a handle, `offered` as the answer to *request*.

        Does only what the answer needs: call `used` once the kernel has the handle, else `release`. Returns None if it
        takes `open`.
        """
        began = time.perf_counter()
        inode = self._names.inodes.get(number)
        if inode is None or inode.kind is not InodeKind.OBJECT or inode.generation is None:
            return None
        if not self._trust.known(inode.generation):
            return None
        handle, blob, counts = self._spare.pop(number, (0, None, None))
        if blob is None or handle >> BACKING_SHIFT != blob.backing_id:
            self._handles.remove(handle)
            handle, blob = 0, self._blobs.known(self._blobs.token(inode.generation))
        if blob is None or not self._opener.ready(inode, blob) or not self._blobs.unchanged(blob):
            self._handles.remove(handle)
            return None
        handle = handle or self._handles.made(inode, blob)
        self._handles.offered(handle, request)
        self._resident[handle] = inode, blob, counts, began
        return handle

    def used(self, handle: int, thread: int, caller: Callable[[], Caller]) -> None:
        """Complete the open by `open_resident`, whose handle a thread has got, and make one for the next open."""
        inode, blob, counts, began = self._resident.pop(handle)
        waited = time.perf_counter() - began
        counts = counts or self._tracer.models.of(inode.path)
        self._blobs.use(blob, inode.generation or blob.generation)
        self._prefetcher.record_open(blob, readable_by(self._control.authorisation, caller))
        self._opener.opened(inode, blob)
        if self._opener.reopens.expected(thread, inode.path):
            self._opener.reopens.completed(thread, inode.path)
            self._tracer.reopened(thread, inode.path)
        else:
            self._resident_seconds.observe(waited)
            counts.host += 1
        if self._refusals:
            self._refusals.pop(inode.path, None)
        self._handles.add(handle, OpenFile(inode, blob, thread))
        self._handles.delivered(handle)
        while len(self._spare) >= MOST_SPARE:
            self._handles.remove(self._spare.pop(next(iter(self._spare)))[0])
        self._spare[inode.number] = self._handles.made(inode, blob), blob, counts

    async def _open_control(
        self, inode: Inode, caller: Callable[[], Caller], interruptible: Interruptible
    ) -> OpenReply:
        with interruptible():
            await self._trust.admit_control(inode, inode.control)
            control = await self._control.open(inode, caller())
            handle = self._handles.add_control(inode, control)
            self._control.assign_handle(control, handle)
        return OpenReply(handle=handle, keep_cache=False, direct_io=True)

    def delivered(self, handle: int) -> None:
        """Record that the kernel has got the handle of a file or directory."""
        self._handles.delivered(handle)
        file = self._handles.files.get(handle)
        if file is not None and file.reopened_by is not None:
            self._opener.reopens.completed(file.reopened_by, file.inode.path)
            file.reopened_by = None

    async def read(self, handle: int, offset: int, size: int) -> Buffer:
        """Read at most *size* bytes of an open file from *offset* on; fewer only at its end.

        Raises ObjectChangedError when missing bytes belong to a content that the store no longer has.
        """
        control = self._handles.controls.get(handle)
        if control is not None:
            return await control.read(offset, size)
        file = self._handles.files.get(handle)
        if file is None:
            raise StaleHandleError(f"handle {handle} is not known")
        stop = min(offset + size, file.blob.generation.size)
        if offset >= stop:
            return b""
        if file.pattern is None:
            file.pattern = AccessPattern(self._ends.setdefault(file.blob.token, new_ends()))
        began = time.perf_counter()
        try:
            with self._noting_refusals(file.inode):
                data = await self._trust.read(file.blob, offset, stop, file.pattern)
        except ObjectChangedError:
            self._names.replaced(file.inode)
            raise
        if file.trace is not None:
            self._tracer.has_read(file.trace, began)
        self.reads += 1
        self.read_bytes += len(data)
        return data

    def path(self, handle: int) -> str | None:
        """The path of an open model file below the mount; None for any other handle."""
        file = self._handles.files.get(handle)
        return None if file is None else file.inode.path

    def registered(self, blob: Blob) -> None:
        """A blob is registered for passthrough: the kernel drops its pages of the programs that read it before.

        Mappings that programs made before have their pages again once they touch them, until the last close.
        """
        if blob.handles > blob.passed:
            inodes = (file.inode for file in self._handles.files.values() if file.blob is blob)
            for number in {inode.number for inode in inodes if inode.cached}:
                self._drop_pages(number)

    def release(self, handle: int) -> None:
        """Close a file or directory: its last reference, mappings included, is gone.

        The last close in cached mode of a registered blob makes the kernel drop its pages of that inode. Later opens
        are in passthrough mode, and read the pages of the local file.
        """
        file = self._handles.remove(handle)
        if file is None:
            self._resident.pop(handle, None)
            return
        if file.trace is not None:
            self._tracer.closed(file.trace)
        passed = passed_through(handle)
        self._opener.closed(file.inode, file.blob, passed=passed)
        self._ioctls.closed(handle)
        self._prefetcher.closed(file.blob)
        self._blobs.release(file.blob)
        if not passed and not file.inode.cached and file.blob.backing_id:
            self._drop_pages(file.inode.number)
