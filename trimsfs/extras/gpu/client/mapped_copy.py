"""Maps copies of models in a device's memory into this process, while anything refers to them."""

import io
import logging
import time
import weakref
from functools import cache
from pathlib import Path

from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.client import descriptor_client
from trimsfs.extras.gpu.client.copy_leases import CopyDescription, Lease, take
from trimsfs.extras.gpu.client.gpu_errors import GpuError

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""How long the client retries when a server refuses a lease's token: a takeover may be under way."""
_INTERVAL_S = 0.05


class MappedCopy:
    """A lease of a copy, and the copy's mapped memory. The last reference to this object releases both, in any thread.

    At the end of the process, the driver and the kernel release them. A forked child has no mapping, and releases
    nothing.
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
        """Copy a part of the copy to the host's memory. Raises CudaError."""
        with _context(self.ordinal):
            stream = cuda.Stream()
            try:
                stream.to_host(host_address, address, size)
                stream.synchronize()
            finally:
                stream.close()


def map_copy(model: Path, file: io.FileIO, device: cuda.DeviceInfo, pattern: str | None, memory: str) -> MappedCopy:
    """Lease a copy on a device and map it. Raises GpuError, GpuFullError, GpuLostError."""
    lease = take(model, file, device, pattern, memory)
    try:
        with _context(device.ordinal):
            description, mapped = _mapped_soon(lease, device.ordinal)
            return MappedCopy(lease, description, device, mapped)
    except cuda.CudaError as error:
        lease.close()
        raise GpuError(f"{model}: the copy on {device.uuid} cannot be mapped: {error}") from None
    except BaseException:
        lease.close()
        raise


def _mapped_soon(lease: Lease, ordinal: int) -> tuple[CopyDescription, cuda.DeviceMemory]:
    """Map a lease's copy; retries for PATIENCE_S once a server refuses. Raises GpuError, GpuLostError, CudaError."""
    deadline: float | None = None
    while True:
        description = lease.description()
        try:
            return description, _mapped(description, ordinal)
        except descriptor_client.NotYetError as error:
            deadline = deadline or time.monotonic() + PATIENCE_S
            if time.monotonic() > deadline:
                raise GpuError(str(error)) from None
            log.debug("the server refused the lease's token: retrying: %s", error)
        time.sleep(_INTERVAL_S)


def _mapped(description: CopyDescription, ordinal: int) -> cuda.DeviceMemory:
    """Map the memory of a description. Raises GpuError, and CudaError."""
    if description.memory == "ipc":
        return cuda.IpcMemory.open(description.handle, description.size)
    descriptor, size = descriptor_client.receive(description.socket, description.token)
    try:
        if size != description.size:
            sizes = f"{size} bytes instead of {description.size}"
            raise GpuError(f"{description.socket}: {sizes}: update client and server to the same version")
        return cuda.VmmMemory.adopt(ordinal, size, descriptor.number)
    finally:
        descriptor.close()


def _release(lease: Lease, memory: cuda.DeviceMemory, ordinal: int) -> None:
    if not lease.held:
        return
    try:
        with _context(ordinal):
            cuda.synchronize()  # work that the program has queued may still read the memory
            memory.close()
    except cuda.CudaError as error:  # memory that may still be mapped must stay leased
        log.warning("a model stays in the memory of cuda:%d until this process ends: %s", ordinal, error)
        return
    lease.close()


@cache
def _context(ordinal: int) -> cuda.Context:
    """The context of a device, kept until the process ends, as frameworks keep it."""
    return cuda.Context(ordinal)
