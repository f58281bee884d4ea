"""The CUDA driver's interface, as far as it is used: by the server, and by programs that take its copies.

The only home of cuda-bindings. Nothing here loads a runtime library or a framework, and nothing initialises the driver
before the first call: an initialised driver does not survive a fork. Addresses are device addresses unless they are
called the host's; all of them and all sizes are in bytes. Everything but `load_driver` and `devices` needs the context
of a device to be current in the calling thread, see `Context`. Failures of the driver raise `CudaError`.
"""

import ctypes
import uuid
from dataclasses import dataclass
from typing import Any

_missing = ""
try:
    from cuda.bindings import driver
except ImportError:  # it is an extra
    driver, _missing = None, "cuda-python is not installed: pip install 'trimsfs[cuda]'"
except (OSError, RuntimeError) as error:  # without ldconfig it looks for libraries by a compiler, which writes files
    driver = None
    _missing = f"cuda-python cannot be used: {error}: set TMPDIR to a directory that can be written to"

LIBRARY = "libcuda.so.1"
IPC_HANDLE_SIZE = 64


class CudaError(Exception):
    """The driver has refused or failed; ``name`` is what it calls the error, as ``CUDA_ERROR_OUT_OF_MEMORY``."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name

    @property
    def out_of_memory(self) -> bool:
        """Whether the device has too little memory left."""
        return self.name == "CUDA_ERROR_OUT_OF_MEMORY"


class CudaUnavailableError(CudaError):
    """There is no driver, no cuda-python or no device: what is missing, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__("CUDA_ERROR_NO_DEVICE", message)


def load_driver() -> None:
    """Load the driver's library, for a process that cannot do so later; initialises nothing.

    Raises CudaUnavailableError.
    """
    if driver is None:
        raise CudaUnavailableError(_missing)
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CudaUnavailableError(f"no CUDA driver: {error}: install the driver of the GPU") from None


def call(name: str, *arguments: Any) -> Any:
    """What a function of the driver gives: None, a value or a tuple of values. Raises CudaError."""
    try:
        result, *values = getattr(driver, name)(*arguments)
    except (OSError, RuntimeError) as error:  # of cuda-bindings: it finds no library, or one that is too old
        raise CudaError("CUDA_ERROR_NOT_FOUND", f"{name}: {error}: install a newer driver") from error
    if result != driver.CUresult.CUDA_SUCCESS:
        known, text = driver.cuGetErrorString(result)
        told = text.decode() if known == driver.CUresult.CUDA_SUCCESS and text else "unknown error"
        raise CudaError(result.name, f"{name}: {result.name}: {told}")
    return values[0] if len(values) == 1 else tuple(values) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device: its place among those that this process may see, its UUID as `nvidia-smi` has it, and its memory."""

    ordinal: int
    uuid: str
    name: str
    total: int


def devices() -> list[DeviceInfo]:
    """The devices that this process may see. Raises CudaUnavailableError when there is none, CudaError."""
    load_driver()
    try:
        call("cuInit", 0)
        count = call("cuDeviceGetCount")
    except CudaError as error:
        raise CudaUnavailableError(f"no CUDA device: {error}") from None
    if count == 0:
        raise CudaUnavailableError("no CUDA device: the driver shows none to this process")
    return [_found(ordinal) for ordinal in range(count)]


def _found(ordinal: int) -> DeviceInfo:
    device = call("cuDeviceGet", ordinal)
    # The second version, which is the only one by now, tells the parts of a partitioned device from each other.
    identity = call("cuDeviceGetUuid_v2" if hasattr(driver, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid", device)
    return DeviceInfo(
        ordinal=ordinal,
        uuid=f"GPU-{uuid.UUID(bytes=bytes(identity.bytes))}",
        name=call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace"),
        total=call("cuDeviceTotalMem", device),
    )


class Context:
    """The primary context of a device, which every library in a process shares."""

    def __init__(self, ordinal: int) -> None:
        self._device = call("cuDeviceGet", ordinal)
        self._context = call("cuDevicePrimaryCtxRetain", self._device)

    def enter(self) -> None:
        """Make it current in this thread, for good."""
        call("cuCtxSetCurrent", self._context)

    def __enter__(self) -> None:
        """Make it current in this thread until the end of the block."""
        call("cuCtxPushCurrent", self._context)

    def __exit__(self, *_: object) -> None:
        call("cuCtxPopCurrent")

    def close(self) -> None:
        """Let go of it."""
        call("cuDevicePrimaryCtxRelease", self._device)


def free_and_total() -> tuple[int, int]:
    """Bytes of the current device that nobody uses, and all it has."""
    free, total = call("cuMemGetInfo")
    return free, total


def synchronize() -> None:
    """Wait until all that this process has asked of the current device is done."""
    call("cuCtxSynchronize")


# Memory of a device


class VmmMemory:
    """Physical memory of a device, mapped in this process; whoever has a descriptor of it can map it as well.

    It lives until every process has unmapped it and closed its descriptors. ``size`` is a multiple of what the device
    allocates at a time.
    """

    def __init__(self, ordinal: int, size: int, handle: Any, *, writable: bool) -> None:
        """Map what a *handle* of the driver stands for, and let go of the handle."""
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
        """New memory of a device, at least *size* bytes, writable by this process."""
        properties = _properties(ordinal)
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = call("cuMemGetAllocationGranularity", properties, minimum)
        size = -(-max(1, size) // granularity) * granularity
        return cls(ordinal, size, call("cuMemCreate", size, properties, 0), writable=True)

    @classmethod
    def adopt(cls, ordinal: int, size: int, descriptor: int) -> "VmmMemory":
        """Memory that another process has allocated, by a descriptor of it, to be read; the descriptor stays open."""
        handle = call("cuMemImportFromShareableHandle", descriptor, _descriptor_kind())
        return cls(ordinal, size, handle, writable=False)

    def protect(self, *, writable: bool) -> None:
        """Have this process's writes allowed, or fault."""
        access = driver.CUmemAccessDesc()
        access.location = self._location
        flags = driver.CUmemAccess_flags
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        call("cuMemSetAccess", self.address, self.size, [access], 1)

    def export(self) -> int:
        """A descriptor of the memory, to be closed by the caller."""
        return int(call("cuMemExportToShareableHandle", self._handle, _descriptor_kind(), 0))

    def close(self) -> None:
        """Unmap it."""
        call("cuMemUnmap", self.address, self.size)
        call("cuMemAddressFree", self.address, self.size)
        call("cuMemRelease", self._handle)


class IpcMemory:
    """Memory of a device that other processes open by a handle of 64 bytes, always to read and write.

    It lives as long as this process keeps it: others lose it then.
    """

    def __init__(self, address: int, size: int, *, owner: bool) -> None:
        self.address = address
        self.size = size
        self._owner = owner

    @classmethod
    def allocate(cls, size: int) -> "IpcMemory":
        """New memory of the current device, in whole blocks of 2 MiB: what shares a block is handed out with it."""
        size = -(-max(1, size) // _BLOCK) * _BLOCK
        return cls(int(call("cuMemAlloc", size)), size, owner=True)

    @classmethod
    def open(cls, handle: bytes, size: int) -> "IpcMemory":
        """Memory of another process, by its handle."""
        opaque = driver.CUipcMemHandle()
        ctypes.memmove(opaque.getPtr(), handle, IPC_HANDLE_SIZE)
        flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return cls(int(call("cuIpcOpenMemHandle", opaque, int(flag))), size, owner=False)

    def handle(self) -> bytes:
        """The handle by which other processes open it."""
        opaque = call("cuIpcGetMemHandle", self.address)  # it owns what its pointer leads to
        return ctypes.string_at(opaque.getPtr(), IPC_HANDLE_SIZE)

    def close(self) -> None:
        """Free it, or let go of another process's."""
        call("cuMemFree" if self._owner else "cuIpcCloseMemHandle", self.address)


DeviceMemory = VmmMemory | IpcMemory
_BLOCK = 2 << 20


def _descriptor_kind() -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _location(ordinal: int) -> Any:
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = ordinal
    return location


def _properties(ordinal: int) -> Any:
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location = _location(ordinal)
    properties.requestedHandleTypes = _descriptor_kind()
    return properties


# Memory of the host, and copies


class PinnedBuffer:
    """Memory of the host that a device copies from and to by itself. ``view`` is all of it."""

    def __init__(self, size: int) -> None:
        self.address = int(call("cuMemHostAlloc", size, 0))
        self.view = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")

    def close(self) -> None:
        """Free it; nobody may use ``view`` any more."""
        self.view.release()
        call("cuMemFreeHost", self.address)


class Stream:
    """Copies in their order, beside those of other streams."""

    def __init__(self) -> None:
        self._stream = call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def to_device(self, address: int, host_address: int, size: int) -> None:
        """Begin to copy from the host's memory, which has to stay as it is until the copy is done."""
        call("cuMemcpyHtoDAsync", address, host_address, size, self._stream)

    def to_host(self, host_address: int, address: int, size: int) -> None:
        """Begin to copy to the host's memory."""
        call("cuMemcpyDtoHAsync", host_address, address, size, self._stream)

    def clear(self, address: int, size: int) -> None:
        """Begin to write zeros."""
        call("cuMemsetD8Async", address, 0, size, self._stream)

    def synchronize(self) -> None:
        """Wait until all that was begun is done."""
        call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Wait, and let go of it."""
        call("cuStreamDestroy", self._stream)


def clear(address: int, size: int) -> None:
    """Have zeros in memory of the device, and wait until they are there."""
    stream = Stream()
    try:
        stream.clear(address, size)
        stream.synchronize()
    finally:
        stream.close()


def register(host_address: int, size: int) -> None:
    """Pin memory of the host that is there already. Fails for mappings of files on disk."""
    call("cuMemHostRegister", host_address, size, 0)


def unregister(host_address: int) -> None:
    """The opposite of `register`."""
    call("cuMemHostUnregister", host_address)
