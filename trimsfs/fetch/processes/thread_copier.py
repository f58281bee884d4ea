"""The copier of a fetch process: threads read from the store and write chunks into the page cache, with checksums."""

import hashlib
import mmap
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from trimsfs.checksums import crc32c, crc32c_of_file
from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import StoreError, TransientStoreError
from trimsfs.fetch.copier import Arrived, Extent, Landed, LocalBytes
from trimsfs.fetch.flights import Priority
from trimsfs.fetch.peers import PeerAnswer, PeerReader, PeerRequest
from trimsfs.stores.base import Sink, Store
from trimsfs.stores.digests import RWF_DONTCACHE, Algorithm, compute
from trimsfs.stores.router import store_of
from trimsfs.telemetry.open_trace import Spent
from trimsfs.tiers.host.page_cache import populate
from trimsfs.types import Buffer, ChunkRecord, Generation

T = TypeVar("T")

HUGE = 2 << 20
"""Bytes in one write that ext4 and xfs cache in one huge page."""
SMALL = 256 << 10
SLOW_RATE = 1e9
"""Bytes a second of processor time below which huge pages are slow; writes with free memory are several times faster.
"""
SPAN = 256 << 20
"""Bytes to write in small pages before huge ones are tried again."""
WRITE_SIZE = HUGE
"""Most bytes in one write."""
SMALL_BUFFER = 1 << 18
"""Extents up to this size use a small buffer: clearing a large one takes longer than their fetch."""
POPULATE_SIZE = 8 << 20
"""Bytes to populate at a time; a cancelled worker ends between them."""
FIRST_WRITE_SHARE = 8
"""The first write is this many times smaller if a reader waits for its bytes."""
LEAST_PART, LEAST_PART_RATE = 32 << 10, 32 << 10
"""Bytes of a chunk, in all and a second, that are worth keeping if its request fails. What comes more slowly is no
progress: else a reader would wait without end."""
REPORT_S = 0.05
"""On a slow link, bytes are written and reported after this time at the latest: somebody may begin to wait for them."""


class ThreadCopier:
    """A `Copier` that works in threads of this process. Only in a fleet are there *peers*.

    For a streaming store, callbacks run in the reading thread, so that the next bytes need not wait for them.
    """

    def __init__(self, store: Store, *, threads: int, peers: PeerReader | None = None) -> None:
        self._store = store
        self._peers = peers
        self._limiter = trio.CapacityLimiter(threads)
        self._buffers = defaultdict[int, list[bytearray]](list)
        self._pages = PageWriter()

    async def fetch(
        self,
        generation: Generation,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None = None,
        *,
        eager: bool = False,
        spent: Spent | None = None,
        priority: Priority | None = None,
    ) -> str | None:
        del priority  # its threads have that of this process
        whole: list[ChunkRecord] = []
        streaming = store_of(self._store, generation.key).streaming
        buffers = self._buffers_for(extent)
        buffer = buffers.pop()
        writer = _ChunkWriter(
            extent,
            landed if streaming else whole.append,
            arrived if streaming else None,
            buffer,
            self._pages,
            spent or Spent(),
            eager=eager,
        )
        try:
            version = await self._store.read(generation, extent.start, extent.size, writer)
        except _FileError as error:
            raise OSError(*error.args) from error
        except BaseException as error:
            await _close([writer])  # the reading thread may go on for a moment, and the file be closed
            if isinstance(error, TransientStoreError):
                await in_thread(writer.land_part, limiter=_closing)  # a disk may stand still
            raise
        buffers.append(buffer)
        for record in whole:
            landed(record)
        return version

    def _buffers_for(self, extent: Extent) -> list[bytearray]:
        """The unused buffers for an extent, at least one."""
        size = min(SMALL_BUFFER, WRITE_SIZE) if extent.size <= SMALL_BUFFER else WRITE_SIZE
        buffers = self._buffers[size]
        if not buffers:
            buffers.append(bytearray(size))
        return buffers

    async def fetch_from_peer(
        self, request: PeerRequest, extent: Extent, landed: Landed, *, priority: Priority | None = None
    ) -> PeerAnswer:
        del priority
        assert self._peers is not None
        begun: list[tuple[_ChunkWriter, bytearray]] = []

        def begin(crcs: Sequence[int]) -> Sink:
            if len(crcs) != -(-extent.size // extent.chunk_size):
                raise ChecksumError(f"{len(crcs)} checksums")
            buffer = self._buffers_for(extent).pop()

            def checked(record: ChunkRecord) -> None:
                if record.crc != crcs[record.chunk - extent.start // extent.chunk_size]:
                    raise ChecksumError(f"chunk {record.chunk} differs from its CRC32C")
                landed(record)

            writer = _ChunkWriter(extent, checked, None, buffer, self._pages, Spent())
            begun.append((writer, buffer))
            return writer

        try:
            answer = await self._peers.read(request, extent.size, begin)
        except ChecksumError as error:
            answer = PeerAnswer(outcome="damaged", detail=str(error))
        except _FileError as error:
            raise OSError(*error.args) from error
        except BaseException:
            await _close([writer for writer, _ in begun])
            raise
        for writer, buffer in begun:
            writer.close()
            self._buffers[len(buffer)].append(buffer)
        return answer

    async def ask_peer(self, request: PeerRequest) -> PeerAnswer:
        assert self._peers is not None
        return await self._peers.ask(request)

    async def copy(self, source: LocalBytes, extent: Extent) -> bool:
        # Not abandoned, as the file that it writes to may be closed then.
        return await in_thread(partial(self._copy, source, extent), limiter=self._limiter)

    def _copy(self, source: LocalBytes, extent: Extent) -> bool:
        data = memoryview(mmap.mmap(-1, extent.size))  # the bytes that are compared are those that are written
        if _read_once(source.descriptor, data, source.position) < extent.size or crc32c(data) != source.crc:
            return False
        if source.sha256 and hashlib.sha256(data).digest() != source.sha256:
            return False
        for start in range(0, extent.size, WRITE_SIZE):
            self._pages.write(extent.descriptor, data[start : start + WRITE_SIZE], extent.position + start)
        return True

    async def checksum(self, descriptor: int, start: int, stop: int) -> int | None:
        return await self._in_thread(partial(crc32c_of_file, descriptor, start, stop))

    async def digest(
        self, descriptor: int, size: int, algorithm: Algorithm, part_size: int, *, idle: bool = False
    ) -> bytes | None:
        return await self._in_thread(partial(compute, descriptor, size, algorithm, part_size))

    async def populate(self, descriptor: int, start: int, stop: int) -> None:
        await self._in_thread(partial(_populate, descriptor, start, stop))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        # Abandon the thread, so that a process that is no longer needed ends at once.
        return await in_thread(function, limiter=self._limiter, abandon_on_cancel=True)


async def _close(writers: "Sequence[_ChunkWriter]") -> None:
    """Wait until no thread writes any more; if one writes, in another thread, as a disk may stand still for a while."""
    for writer in writers:
        if not writer.close(wait=False):
            with trio.CancelScope(shield=True):
                await in_thread(writer.close, limiter=_closing)


_closing = trio.CapacityLimiter(1000)
"""A limit of their own for threads that wait for a writer: other work goes on meanwhile."""


class ChecksumError(StoreError):
    """A peer's bytes differ from the checksums that the peer tells, or it tells none."""


class _FileError(StoreError):
    """An OSError of the written file, as distinct from one of the store."""


class PageWriter:
    """Writes fetched bytes into the page cache in huge pages while these are cheap, else in small ones.

    A virtual machine gives large blocks of free memory back to its host. The host returns them page by page, at a tenth
    of the speed of memory; small pages come from memory that the machine has kept. Huge pages are quicker to map, but
    not worth waiting for, so the writer measures the processor time of each huge write.

    The kernel lets one thread at a time write to a file while the others spin. So the threads of a process take turns.
    ``size`` is the number of bytes that callers should write at a time.
    """

    def __init__(self) -> None:
        self.size = HUGE
        self._left = 0
        self._turn = threading.Lock()

    def write(self, descriptor: int, part: memoryview, position: int) -> None:
        """Write all of *part*. Raises OSError."""
        with self._turn:
            self._write(descriptor, part, position)

    def _write(self, descriptor: int, part: memoryview, position: int) -> None:
        began = time.thread_time()
        done = 0
        while done < len(part):
            done += os.pwrite(descriptor, part[done:], position + done)
        if self.size == SMALL:
            self._left -= len(part)
            if self._left <= 0:
                self.size = HUGE
        elif len(part) == HUGE and (time.thread_time() - began) * SLOW_RATE > HUGE:
            self.size, self._left = SMALL, SPAN


class _ChunkWriter:
    """Writes the bytes of a range, in order: a `trimsfs.stores.http.receive_loop.RoomySink`.

    If it is *eager*, its first write is a small one, and it calls *arrived* after each write, else now and then. The
    caller reuses the *buffer*: the kernel would have to clear the pages of a new one.
    """

    def __init__(
        self,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None,
        buffer: bytearray,
        pages: PageWriter,
        spent: Spent,
        *,
        eager: bool = False,
    ) -> None:
        self._descriptor = extent.descriptor
        self._offset = extent.start
        self._stop = extent.stop
        self._chunk_size = extent.chunk_size
        self._shift = extent.position - extent.start
        self._landed = landed
        self._arrived = arrived
        self._eager = eager
        self._report_s = 0.0 if eager else REPORT_S
        self._crc = 0
        self._began = extent.start
        self._write_end = extent.start + (WRITE_SIZE // FIRST_WRITE_SHARE if eager else WRITE_SIZE)
        self._wrote_at = self._reported_at = self._since = time.perf_counter()
        self._buffer = memoryview(buffer)
        self._filled = 0
        self._pages = pages
        self._spent = spent
        self._turn = threading.Lock()
        self._closed = False

    def close(self, *, wait: bool = True) -> bool:
        """Write nothing more, even if more pieces come; False if a thread writes, unless this may *wait*."""
        if not self._turn.acquire(blocking=wait):
            return False
        self._closed = True
        self._turn.release()
        return True

    def land_part(self) -> None:
        """Land what has come of a chunk, once closed: the next request need not bring it again. Raises OSError."""
        if self._offset - self._began < max(LEAST_PART, LEAST_PART_RATE * (time.perf_counter() - self._since)):
            return
        try:
            self._write()
        except _FileError as error:
            raise OSError(*error.args) from error
        self._land()

    def __call__(self, piece: Buffer) -> None:
        view = memoryview(piece)
        while view:
            room = self.room()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            self.filled(count)
            view = view[count:]

    def room(self) -> memoryview:
        """Where the bytes up to the end of the next write go."""
        size = min(self._chunk_end, self._write_end) - self._offset
        if size <= 0:
            raise StoreError("the store sent more bytes than requested")
        return self._buffer[self._filled : self._filled + size]

    @property
    def _chunk_end(self) -> int:
        return min(self._stop, (self._offset // self._chunk_size + 1) * self._chunk_size)

    def filled(self, count: int, *, waits: bool = False) -> None:
        """Take *count* bytes, and write if that is worth it, was long ago, or a reader waits as the stream does."""
        with self._turn:
            if self._closed:
                raise StoreError("no longer wanted")
            began = time.perf_counter()
            if not self._spent.first_byte:
                self._spent.first_byte = self._wrote_at = began
            end, write_end = self._chunk_end, self._write_end
            self._crc = crc32c(self._buffer[self._filled : self._filled + count], self._crc)
            self._filled += count
            self._offset += count
            now = time.perf_counter()
            self._spent.checksum_s += now - began
            due = now - self._wrote_at >= REPORT_S or (waits and self._eager)
            if due or self._offset in (end, write_end):
                self._write()
                if self._offset == end:
                    self._land()
                elif self._arrived is not None and self._wrote_at - self._reported_at >= self._report_s:
                    self._reported_at = self._wrote_at
                    self._arrived(self._offset)

    def _land(self) -> None:
        """A chunk is whole, or the part of it that is fetched."""
        chunk, length = self._began // self._chunk_size, self._offset - self._began
        self._landed(ChunkRecord(chunk=chunk, length=length, crc=self._crc))
        self._crc, self._began, self._since = 0, self._offset, time.perf_counter()

    def _write(self) -> None:
        part, began = self._buffer[: self._filled], time.perf_counter()
        try:
            self._pages.write(self._descriptor, part, self._offset + self._shift - self._filled)
        except OSError as error:
            raise _FileError(error.errno, error.strerror) from error
        self._filled, self._wrote_at = 0, time.perf_counter()
        self._spent.write_s += self._wrote_at - began
        size = min(self._pages.size, WRITE_SIZE)
        self._write_end = self._offset - self._offset % size + size


def _read_once(descriptor: int, data: memoryview, position: int) -> int:
    """Fill *data* from a file; returns the number of bytes. If the kernel can, it adds no pages to the page cache."""
    try:
        return os.preadv(descriptor, [data], position, RWF_DONTCACHE)
    except OSError:
        return os.preadv(descriptor, [data], position)


def _populate(descriptor: int, start: int, stop: int) -> None:
    for begin in range(start - start % POPULATE_SIZE, stop, POPULATE_SIZE):
        populate(descriptor, begin, min(begin + POPULATE_SIZE, stop))
