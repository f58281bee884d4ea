"""A GPU: runs calls of the driver in a worker thread, and owns the staging buffers for copies.

Each device runs one call at a time, so that a hanging call blocks only its own device.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import DeviceError
from trimsfs.extras.gpu.cuda import (
    Context,
    CudaError,
    DeviceInfo,
    DeviceMemory,
    IpcMemory,
    PinnedBuffer,
    Stream,
    VmmMemory,
    clear,
    free_and_total,
)
from trimsfs.types import CHUNK_SIZE

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STAGING_BUFFERS = 8
"""Concurrent copies. Each takes CHUNK_SIZE bytes of pinned memory, from first use until the server ends."""
_FATAL = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        *("ASSERT", "CONTAINED", "CONTEXT_IS_DESTROYED", "DEINITIALIZED", "DEVICE_NOT_LICENSED", "DEVICE_UNAVAILABLE"),
        *("ECC_UNCORRECTABLE", "EXTERNAL_DEVICE", "HARDWARE_STACK_ERROR", "ILLEGAL_ADDRESS", "ILLEGAL_INSTRUCTION"),
        *("INVALID_ADDRESS_SPACE", "INVALID_DEVICE", "INVALID_PC", "LAUNCH_FAILED", "LAUNCH_TIMEOUT"),
        *("MISALIGNED_ADDRESS", "NO_DEVICE", "NVLINK_UNCORRECTABLE", "SYSTEM_NOT_READY", "UNKNOWN"),
    )
)
"""Errors after which the driver fails every call of this process. Other errors concern one call."""


class StagingBuffer:
    """A buffer of pinned memory, CHUNK_SIZE bytes in ``view``, and the stream for copies to and from it.

    Its methods are for the device's thread.
    """

    def __init__(self) -> None:
        self._stream = Stream()  # first: the device may be full, and page-locked memory stays until the process ends
        self._buffer = PinnedBuffer(CHUNK_SIZE)
        self.view = self._buffer.view

    def write(self, address: int, size: int) -> None:
        """Begin to copy the first bytes of ``view`` to the device."""
        self._stream.to_device(address, self._buffer.address, size)

    def read(self, address: int, size: int) -> None:
        """Copy bytes of the device to the beginning of ``view``, and wait."""
        self._stream.to_host(self._buffer.address, address, size)
        self._stream.synchronize()

    def finish(self) -> None:
        """Wait until all begun copies are done."""
        self._stream.synchronize()


class Device:
    """A device of this host. Its first use creates its context and memory.

    After a failure, every later call fails, and ``failure`` says why; the device then calls *on_failure*, once.
    """

    def __init__(self, info: DeviceInfo, on_failure: Callable[[], None]) -> None:
        self.info = info
        self.uuid = info.uuid
        self.failure: str | None = None
        self._on_failure = on_failure
        self._limiter = trio.CapacityLimiter(1)
        self._calls: set[trio.CancelScope] = set()
        self._context: Context | None = None
        self._all_buffers: list[StagingBuffer] = []
        self._returned, self._free_buffers = trio.open_memory_channel[StagingBuffer | None](STAGING_BUFFERS)
        for _ in range(STAGING_BUFFERS):
            self._returned.send_nowait(None)  # allocated at first use

    async def run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a function in the device's thread and context. Raises DeviceError, and CudaError when out of memory."""
        if self.failure is not None:
            raise DeviceError(f"{self.uuid}: {self.failure}")
        # Shield calls that have begun from cancellation, so that the accounts stay right.
        with trio.CancelScope(shield=True) as call:
            self._calls.add(call)
            try:
                return await in_thread(
                    self._in_context, function, *arguments, abandon_on_cancel=True, limiter=self._limiter
                )
            except CudaError as error:
                if error.out_of_memory:
                    raise
                if error.name in _FATAL:
                    self.fail(str(error))
                raise DeviceError(f"{self.uuid}: {error}") from error
            finally:
                self._calls.discard(call)
        raise DeviceError(f"{self.uuid}: the server is ending")

    def abandon(self) -> None:
        """Stop waiting for calls under way, which may never return: the server is ending."""
        self.failure = self.failure or "the server is ending"
        for call in self._calls:
            call.cancel()

    def fail(self, reason: str) -> None:
        """Mark the device as failed, until the server ends."""
        if self.failure is None:
            self.failure = f"{reason}: check `nvidia-smi`, then run `mountctl restart`"
            log.error("device %s has failed: %s", self.uuid, self.failure)
            self._on_failure()

    def _in_context(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        if self._context is None:
            self._context = Context(self.info.ordinal)
        with self._context:
            return function(*arguments)

    async def free_bytes(self) -> int:
        """Bytes of the device that are free. Raises DeviceError."""
        free, _ = await self.run(free_and_total)
        return free

    async def allocate(self, size: int, *, shared: bool) -> DeviceMemory:
        """Allocate memory, shared by descriptor if *shared*, else by IPC handle. Raises as `run`."""
        if shared:
            return await self.run(VmmMemory.allocate, self.info.ordinal, size)
        return await self.run(IpcMemory.allocate, size)

    async def adopt(self, size: int, descriptor: int) -> VmmMemory:
        """Map memory that an earlier server allocated. Raises as `run`."""
        return await self.run(VmmMemory.adopt, self.info.ordinal, size, descriptor)

    async def clear(self, memory: DeviceMemory) -> None:
        """Zero memory, which may contain data of other programs. Raises DeviceError."""
        await self.run(clear, memory.address, memory.size)

    async def free(self, memory: DeviceMemory) -> None:
        """Free memory after all copies to it; on a failed device, only log."""
        try:
            await self.run(self._free, memory)
        except (DeviceError, CudaError) as error:
            log.info("device %s: memory is not freed: %s", self.uuid, error)

    def _free(self, memory: DeviceMemory) -> None:
        self._finish()
        memory.close()

    @asynccontextmanager
    async def staging_buffer(self) -> AsyncIterator[StagingBuffer]:
        """A staging buffer for the length of the block, free of earlier copies. Copies begun there may outlive it.

        Raises as `run`.
        """
        staged = await self._free_buffers.receive()
        try:
            if staged is None:
                staged = await self.run(StagingBuffer)
                self._all_buffers.append(staged)
            await self.run(staged.finish)
            yield staged
        finally:
            self._returned.send_nowait(staged)

    async def finish(self) -> None:
        """Wait until all copies are done. Raises DeviceError."""
        await self.run(self._finish)

    def _finish(self) -> None:
        for staged in self._all_buffers:
            staged.finish()
