"""Wraps the CUDA driver API for the server and for programs that map its copies.

Only this module imports cuda-bindings. It loads no runtime library and no framework. Only `devices` initialises the
driver, because an initialised driver does not survive a fork. Addresses are device addresses, unless their name says
host; sizes are in bytes. Everything but `load_driver` and `devices` needs a device's context to be current in the
calling thread: see `Context`. Failures of the driver raise `CudaError`.
"""

import ctypes
import functools
import uuid
from dataclasses import dataclass
from typing import Any

LIBRARY = "libcuda.so.1"
IPC_HANDLE_SIZE = 64


class CudaError(Exception):
    """A call of the driver failed; ``name`` is the driver's name of the error, such as ``CUDA_ERROR_OUT_OF_MEMORY``."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name

    @property
    def out_of_memory(self) -> bool:
        """Whether the device lacks memory."""
        return self.name == "CUDA_ERROR_OUT_OF_MEMORY"


class CudaUnavailableError(CudaError):
    """The driver, cuda-python or a device is missing; the message names it, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__("CUDA_ERROR_NO_DEVICE", message)


def load_driver() -> None:
    """Load the driver's library and cuda-python before a sandbox forbids it; initialises nothing.

    Raises CudaUnavailableError.
    """
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CudaUnavailableError(f"no CUDA driver: {error}: if this host has a GPU, install its driver") from None
    bindings()


@functools.cache
def bindings() -> Any:
    """``cuda.bindings.driver``, imported on use: the import takes a tenth of a second, even without a GPU.

    Raises CudaUnavailableError.
    """
    try:
        from cuda.bindings import driver  # noqa: PLC0415
    except ImportError:  # an optional extra
        raise CudaUnavailableError("cuda-python is not installed: pip install 'trimsfs[cuda]'") from None
    except (OSError, RuntimeError) as error:  # without ldconfig, the import runs a compiler, which writes files
        message = f"cuda-python cannot be loaded: {error}: set TMPDIR to a writable directory"
        raise CudaUnavailableError(message) from None
    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver; returns None, a value or a tuple of values. Raises CudaError."""
    try:
        result, *values = getattr(bindings(), name)(*arguments)
    except (OSError, RuntimeError) as error:  # from cuda-bindings: the library is missing or too old
        raise CudaError("CUDA_ERROR_NOT_FOUND", f"{name}: {error}: install a newer driver") from error
    if result != bindings().CUresult.CUDA_SUCCESS:
        known, text = bindings().cuGetErrorString(result)
        description = text.decode() if known == bindings().CUresult.CUDA_SUCCESS and text else "unknown error"
        raise CudaError(result.name, f"{name}: {result.name}: {description}")
    return values[0] if len(values) == 1 else tuple(values) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device: its ordinal in this process, its UUID as `nvidia-smi` shows it, its name and its bytes of memory."""

    ordinal: int
    uuid: str
    name: str
    total: int


def devices() -> list[DeviceInfo]:
    """The devices that this process sees. Raises CudaUnavailableError when there is none, CudaError."""
    load_driver()
    try:
        call("cuInit", 0)
        count = call("cuDeviceGetCount")
    except CudaError as error:
        raise CudaUnavailableError(f"no CUDA device: {error}") from None
    if count == 0:
        raise CudaUnavailableError("no CUDA device: the driver shows none to this process")
    return [_device_info(ordinal) for ordinal in range(count)]


def _device_info(ordinal: int) -> DeviceInfo:
    device = call("cuDeviceGet", ordinal)
    # _v2, the only version in new drivers, distinguishes the parts of a partitioned device.
    identity = call("cuDeviceGetUuid_v2" if hasattr(bindings(), "cuDeviceGetUuid_v2") else "cuDeviceGetUuid", device)
    return DeviceInfo(
        ordinal=ordinal,
        uuid=f"GPU-{uuid.UUID(bytes=bytes(identity.bytes))}",
        name=call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace"),
        total=call("cuDeviceTotalMem", device),
    )


class Context:
    """The primary context of a device, which all libraries of a process share."""

    def __init__(self, ordinal: int) -> None:
        self._device = call("cuDeviceGet", ordinal)
        self._context = call("cuDevicePrimaryCtxRetain", self._device)

    def enter(self) -> None:
        """Make the context current in this thread."""
        call("cuCtxSetCurrent", self._context)

    def __enter__(self) -> None:
        """Make the context current in this thread during the block."""
        call("cuCtxPushCurrent", self._context)

    def __exit__(self, *_: object) -> None:
        call("cuCtxPopCurrent")

    def close(self) -> None:
        """Release the context."""
        call("cuDevicePrimaryCtxRelease", self._device)


def free_and_total() -> tuple[int, int]:
    """Free and total bytes of the current device."""
    free, total = call("cuMemGetInfo")
    return free, total


def synchronize() -> None:
    """Wait for all work that this process has queued on the current device."""
    call("cuCtxSynchronize")


# Memory of a device


class VmmMemory:
    """Physical memory of a device, mapped in this process; other processes map it by a descriptor.

    The memory lives until every process has unmapped it and closed its descriptors. ``size`` is a multiple of the
    device's allocation granularity.
    """

    def __init__(self, ordinal: int, size: int, handle: Any, *, writable: bool) -> None:
        """Map the memory of the driver's *handle*; takes ownership of the handle."""
        self._location = _location(ordinal)
        self.size = size
        self.address = 0
        try:
            self.address = int(call("cuMemAddressReserve", size, 0, 0, 0))
            try:
                call("cuMemMap", self.address, size, 0, handle, 0)
            except BaseException:
                call("cuMemAddressFree", self.address, size)
                raise
        except BaseException:
            call("cuMemRelease", handle)
            raise
        self._handle = handle
        try:
            self.protect(writable=writable)
        except BaseException:
            self.close()
            raise

    @classmethod
    def allocate(cls, ordinal: int, size: int) -> "VmmMemory":
        """Allocate at least *size* bytes of a device, writable by this process."""
        properties = _properties(ordinal)
        minimum = bindings().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = call("cuMemGetAllocationGranularity", properties, minimum)
        size = -(-max(1, size) // granularity) * granularity
        return cls(ordinal, size, call("cuMemCreate", size, properties, 0), writable=True)

    @classmethod
    def adopt(cls, ordinal: int, size: int, descriptor: int) -> "VmmMemory":
        """Map memory of another process read-only, by its *descriptor*, which stays open."""
        handle = call("cuMemImportFromShareableHandle", descriptor, _descriptor_kind())
        return cls(ordinal, size, handle, writable=False)

    def protect(self, *, writable: bool) -> None:
        """Make this process's writes succeed or, if not *writable*, fault."""
        access = bindings().CUmemAccessDesc()
        access.location = self._location
        flags = bindings().CUmemAccess_flags
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        call("cuMemSetAccess", self.address, self.size, [access], 1)

    def export(self) -> int:
        """A new descriptor of the memory, for the caller to close."""
        return int(call("cuMemExportToShareableHandle", self._handle, _descriptor_kind(), 0))

    def close(self) -> None:
        """Unmap the memory, and release it."""
        call("cuMemUnmap", self.address, self.size)
        call("cuMemAddressFree", self.address, self.size)
        call("cuMemRelease", self._handle)


class IpcMemory:
    """Memory of a device that other processes open by an IPC handle of 64 bytes, to read and write.

    When its owner frees it, the other processes lose it.
    """

    def __init__(self, address: int, size: int, *, owner: bool) -> None:
        self.address = address
        self.size = size
        self._owner = owner

    @classmethod
    def allocate(cls, size: int) -> "IpcMemory":
        """Allocate whole blocks of 2 MiB on the current device: a handle exposes everything in its blocks."""
        size = -(-max(1, size) // _BLOCK) * _BLOCK
        return cls(int(call("cuMemAlloc", size)), size, owner=True)

    @classmethod
    def open(cls, handle: bytes, size: int) -> "IpcMemory":
        """Open memory of another process by its handle."""
        opaque = bindings().CUipcMemHandle()
        ctypes.memmove(opaque.getPtr(), handle, IPC_HANDLE_SIZE)
        flag = bindings().CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return cls(int(call("cuIpcOpenMemHandle", opaque, int(flag))), size, owner=False)

    def handle(self) -> bytes:
        """The IPC handle of the memory."""
        opaque = call("cuIpcGetMemHandle", self.address)  # owns the bytes that getPtr() points to
        return ctypes.string_at(opaque.getPtr(), IPC_HANDLE_SIZE)

    def close(self) -> None:
        """Free the memory or, if another process owns it, close it."""
        call("cuMemFree" if self._owner else "cuIpcCloseMemHandle", self.address)


DeviceMemory = VmmMemory | IpcMemory
_BLOCK = 2 << 20


def _descriptor_kind() -> Any:
    return bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _location(ordinal: int) -> Any:
    location = bindings().CUmemLocation()
    location.type = bindings().CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = ordinal
    return location


def _properties(ordinal: int) -> Any:
    properties = bindings().CUmemAllocationProp()
    properties.type = bindings().CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location = _location(ordinal)
    properties.requestedHandleTypes = _descriptor_kind()
    return properties


# Memory of the host, and copies


class PinnedBuffer:
    """Page-locked memory of the host, for DMA, until the process ends. ``view`` covers all of it."""

    def __init__(self, size: int) -> None:
        self.address = int(call("cuMemHostAlloc", size, 0))
        self.view = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")


class Stream:
    """A CUDA stream: its copies run in order, concurrently with other streams."""

    def __init__(self) -> None:
        self._stream = call("cuStreamCreate", int(bindings().CUstream_flags.CU_STREAM_NON_BLOCKING))

    def to_device(self, address: int, host_address: int, size: int) -> None:
        """Begin to copy from the host's memory, which must not change until the copy is done."""
        call("cuMemcpyHtoDAsync", address, host_address, size, self._stream)

    def to_host(self, host_address: int, address: int, size: int) -> None:
        """Begin to copy to the host's memory."""
        call("cuMemcpyDtoHAsync", host_address, address, size, self._stream)

    def clear(self, address: int, size: int) -> None:
        """Begin to write zeros."""
        call("cuMemsetD8Async", address, 0, size, self._stream)

    def synchronize(self) -> None:
        """Wait for all begun copies."""
        call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Destroy the stream; the driver still completes its begun copies."""
        call("cuStreamDestroy", self._stream)


def clear(address: int, size: int) -> None:
    """Zero memory of the device, and wait until that is done."""
    stream = Stream()
    try:
        stream.clear(address, size)
        stream.synchronize()
    finally:
        stream.close()


def register(host_address: int, size: int) -> None:
    """Page-lock existing memory of the host. Fails for mappings of files on disk."""
    call("cuMemHostRegister", host_address, size, 0)


def unregister(host_address: int) -> None:
    """Undo `register`."""
    call("cuMemHostUnregister", host_address)
