"""Copies of models in a device's memory, mapped in this process for as long as anything uses them."""

import io
import logging
import os
import weakref
from functools import cache
from pathlib import Path

from trimsfs import cuda
from trimsfs.client.gpu import sockets
from trimsfs.client.gpu.errors import GpuError
from trimsfs.client.gpu.leases import Lease, Offer, take

log = logging.getLogger(__name__)

Memory = cuda.SharedMemory | cuda.LegacyMemory


class Copy:
    """A lease of a copy, and its memory mapped. Both end with the last that refers to this, in whatever thread.

    Not at the end of the process, nor in a child that was forked: the driver and the kernel see to the one, and the
    other has nothing mapped.
    """

    def __init__(self, lease: Lease, offer: Offer, device: cuda.Found, memory: Memory) -> None:
        self.lease = lease
        self.offer = offer
        self.ordinal = device.ordinal
        self.address = memory.address
        self.read_only = offer.memory == "vmm"
        weakref.finalize(self, _release, lease, memory, device.ordinal).atexit = False

    def read(self, host_address: int, address: int, size: int) -> None:
        """Copy a part of it to this process's memory. Raises CudaError."""
        with _context(self.ordinal):
            stream = cuda.Stream()
            try:
                stream.to_host(host_address, address, size)
                stream.synchronize()
            finally:
                stream.close()


def obtain(model: Path, file: io.FileIO, device: cuda.Found, pattern: str | None, memory: str) -> Copy:
    """Take a lease of a copy on a device and map it. Raises GpuError, GpuFullError, GpuLostError."""
    lease = take(model, file, device, pattern, memory)
    try:
        offer = lease.offer()
        with _context(device.ordinal):
            try:
                return Copy(lease, offer, device, _mapped(offer, device.ordinal))
            except GpuError as error:
                # A server may have been replaced meanwhile: the next knows another token.
                log.debug("%s: once more: %s", model, error)
                offer = lease.offer()
                return Copy(lease, offer, device, _mapped(offer, device.ordinal))
    except cuda.CudaError as error:
        lease.close()
        raise GpuError(f"{model}: it cannot be mapped on {device.uuid}: {error}") from None
    except BaseException:
        lease.close()
        raise


def _mapped(offer: Offer, ordinal: int) -> Memory:
    """Raises GpuError, and CudaError."""
    if offer.memory == "ipc":
        return cuda.LegacyMemory.open(offer.handle, offer.size)
    descriptor, size = sockets.receive(offer.socket, offer.token)
    try:
        return cuda.SharedMemory.adopt(ordinal, size, descriptor)
    finally:
        os.close(descriptor)


def _release(lease: Lease, memory: Memory, ordinal: int) -> None:
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
