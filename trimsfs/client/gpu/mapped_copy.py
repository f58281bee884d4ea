"""Copies of models in a device's memory, mapped in this process for as long as anything uses them."""

import io
import logging
import time
import weakref
from functools import cache
from pathlib import Path

from trimsfs import cuda
from trimsfs.client.gpu import descriptor_client
from trimsfs.client.gpu.errors import GpuError
from trimsfs.client.gpu.leases import CopyDescription, Lease, take

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""For how long a server that refuses a lease's token is asked again: another may just have taken its place."""
_INTERVAL_S = 0.05


class MappedCopy:
    """A lease of a copy, and its memory mapped. Both end with the last that refers to this, in whatever thread.

    Not at the end of the process, nor in a child that was forked: the driver and the kernel see to the one, and the
    other has nothing mapped.
    """

    def __init__(
        self, lease: Lease, description: CopyDescription, device: cuda.DeviceInfo, memory: cuda.DeviceMemory
    ) -> None:
        self.lease = lease
        self.description = description
        self.ordinal = device.ordinal
        self.address = memory.address
        self.read_only = description.memory == "vmm"
        weakref.finalize(self, _release, lease, memory, device.ordinal).atexit = False

    def read(self, host_address: int, address: int, size: int) -> None:
        """MappedCopy a part of it to this process's memory. Raises CudaError."""
        with _context(self.ordinal):
            stream = cuda.Stream()
            try:
                stream.to_host(host_address, address, size)
                stream.synchronize()
            finally:
                stream.close()


def map_copy(model: Path, file: io.FileIO, device: cuda.DeviceInfo, pattern: str | None, memory: str) -> MappedCopy:
    """Take a lease of a copy on a device and map it. Raises GpuError, GpuFullError, GpuLostError."""
    lease = take(model, file, device, pattern, memory)
    try:
        with _context(device.ordinal):
            description, mapped = _mapped_soon(lease, device.ordinal)
            return MappedCopy(lease, description, device, mapped)
    except cuda.CudaError as error:
        lease.close()
        raise GpuError(f"{model}: it cannot be mapped on {device.uuid}: {error}") from None
    except BaseException:
        lease.close()
        raise


def _mapped_soon(lease: Lease, ordinal: int) -> tuple[CopyDescription, cuda.DeviceMemory]:
    """Raises GpuError, GpuLostError and CudaError."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        description = lease.description()
        try:
            return description, _mapped(description, ordinal)
        except descriptor_client.NotYetError as error:
            if time.monotonic() > deadline:
                raise GpuError(str(error)) from None
            log.debug("once more: %s", error)
        time.sleep(_INTERVAL_S)


def _mapped(description: CopyDescription, ordinal: int) -> cuda.DeviceMemory:
    """Raises GpuError, and CudaError."""
    if description.memory == "ipc":
        return cuda.IpcMemory.open(description.handle, description.size)
    descriptor, size = descriptor_client.receive(description.socket, description.token)
    try:
        if size != description.size:
            raise GpuError(
                f"{description.socket}: {size} bytes, and not {description.size}: are client and server of one version?"
            )
        return cuda.VmmMemory.adopt(ordinal, size, descriptor.number)
    finally:
        descriptor.close()


def _release(lease: Lease, memory: cuda.DeviceMemory, ordinal: int) -> None:
    if not lease.held:
        return
    try:
        with _context(ordinal):
            cuda.synchronize()  # what was asked of the device may still read it
            memory.close()
    except cuda.CudaError as error:  # what may still be mapped has to stay leased, until the process ends
        log.warning("a model stays in the device's memory: %s", error)
        return
    lease.close()


@cache
def _context(ordinal: int) -> cuda.Context:
    """The context of a device, kept until the process ends: frameworks keep it as well."""
    return cuda.Context(ordinal)
