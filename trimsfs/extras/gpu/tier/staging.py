"""Copies bytes between blobs and a device through staging buffers: fills a copy, or compares one with its file."""

import ctypes
import logging
import mmap
import os
from collections.abc import Iterator, Sequence

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import DeviceError
from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.cuda import CudaError, Stream
from trimsfs.extras.gpu.tier.device import STAGING_BUFFERS, Device
from trimsfs.extras.gpu.tier.layout import Batch, Layout, Part, Run
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.tiers.blob import Blob
from trimsfs.types import CHUNK_SIZE, Buffer

log = logging.getLogger(__name__)

PARTS_AT_ONCE = 64
"""Copies from registered memory to begin in one call of the driver's thread."""


class BlobSource:
    """The bytes of a blob, which the caller keeps in use, while they may still arrive from the store.

    *in_memory* says whether the blob's file is always in memory, as on a tmpfs.
    """

    def __init__(self, blob: Blob, fetcher: Fetcher, *, in_memory: bool) -> None:
        self._blob = blob
        self._fetcher = fetcher
        self._in_memory = in_memory

    async def bytes_of(self, start: int, stop: int) -> Buffer | None:
        """Wait until the bytes ``[start, stop)`` are local and checked; None if they are in the file.

        They are in the file unless the disk is full. Raises StoreError.
        """
        data = await self._fetcher.read(self._blob, start, stop)
        return None if self._blob.attached and self._blob.readable(start, stop) else data

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._blob.fileno()

    @property
    def registrable(self) -> int:
        """The file's size if it is complete and in memory that the driver may register; else 0."""
        whole = self._in_memory and self._blob.attached and self._blob.complete
        return self._blob.generation.size if whole else 0


async def fill(device: Device, address: int, layout: Layout, source: BlobSource) -> None:
    """Copy the contents of a layout to device memory at *address* while they arrive, several batches at once.

    Raises StoreError, DeviceError, and OSError when the file cannot be read.
    """
    if layout.nbytes and source.registrable and await _from_registered(device, address, layout, source):
        return
    batches = layout.batches(CHUNK_SIZE)
    errors: list[Exception] = []

    async def fill_some() -> None:
        try:
            for batch in batches:
                async with device.staging_buffer() as staged:
                    await _stage(staged.view, batch, source)
                    await device.run(staged.write, address + batch.offset, batch.length)
        except Exception as error:
            errors.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(STAGING_BUFFERS):
            nursery.start_soon(fill_some)
    if errors:
        raise errors[0]
    await device.finish()


async def differs(device: Device, address: int, layout: Layout, source: BlobSource) -> int | None:
    """The first offset at which a copy differs from its file; None if all bytes are equal.

    Raises as `fill`.
    """
    for batch in layout.batches(CHUNK_SIZE):
        async with device.staging_buffer() as expected, device.staging_buffer() as copied:
            await _stage(expected.view, batch, source)
            await device.run(copied.read, address + batch.offset, batch.length)
            for part in (part for run in batch.runs for part in run.parts):
                start, stop = part.offset - batch.offset, part.offset - batch.offset + part.length
                if expected.view[start:stop] != copied.view[start:stop]:
                    return part.offset + _first_difference(expected.view[start:stop], copied.view[start:stop])
    return None


def _first_difference(left: memoryview, right: memoryview) -> int:
    """The first offset at which two unequal buffers of equal length differ."""
    low, high = 0, len(left)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left[low:middle] != right[low:middle] else (middle, high)
    return low


async def _stage(view: memoryview, batch: Batch, source: BlobSource) -> None:
    """Write the bytes of a batch to a buffer, and zeros to the gaps between its parts."""
    end = 0
    for run in batch.runs:
        data = await source.bytes_of(run.start, run.stop)
        views = [_view_of(view, batch, part) for part in run.parts]
        if data is None:
            await in_thread(_read_fully, source.fileno(), views, run.start)
        else:
            for destination, part in zip(views, run.parts, strict=True):
                destination[:] = data[part.source - run.start : part.source - run.start + part.length]
        for part in run.parts:
            begin = part.offset - batch.offset
            view[end:begin] = bytes(begin - end)
            end = begin + part.length


def _view_of(view: memoryview, batch: Batch, part: Part) -> memoryview:
    begin = part.offset - batch.offset
    return view[begin : begin + part.length]


def _read_fully(descriptor: int, views: Sequence[memoryview], offset: int) -> None:
    """Fill views, in order, with a file's bytes from *offset* on. Raises OSError."""
    left = list(views)
    while left:
        count = os.preadv(descriptor, left, offset)
        if count == 0:
            raise OSError("the file has been truncated")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


# If the cache is in memory, the device copies from there by DMA, without staging buffers.


async def _from_registered(device: Device, address: int, layout: Layout, source: BlobSource) -> bool:
    """Copy from the file's pages by DMA; False when the driver cannot register them."""
    for run in _runs(layout):
        await source.bytes_of(run.start, run.stop)
    mapping = mmap.mmap(source.fileno(), source.registrable)  # the driver requires write access, but does not write
    first = ctypes.c_char.from_buffer(mapping)
    host = ctypes.addressof(first)
    try:
        try:
            await device.run(cuda.register, host, len(mapping))
        except (DeviceError, CudaError) as error:
            log.debug("the driver cannot register the file's pages: %s", error)
            return False
        try:
            for index in range(0, len(layout.parts), PARTS_AT_ONCE):
                await device.run(_copy, address, host, layout.parts[index : index + PARTS_AT_ONCE])
        finally:
            with trio.CancelScope(shield=True):
                await device.run(cuda.unregister, host)
    finally:
        del first
        mapping.close()
    return True


def _runs(layout: Layout) -> Iterator[Run]:
    for batch in layout.batches(CHUNK_SIZE):
        yield from batch.runs


def _copy(address: int, host: int, parts: Sequence[Part]) -> None:
    stream = Stream()
    try:
        for part in parts:
            stream.to_device(address + part.offset, host + part.source, part.length)
        stream.synchronize()
    finally:
        stream.close()
