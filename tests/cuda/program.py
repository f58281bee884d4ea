"""A process that does with CUDA what a test tells it, call by call, through cuda-bindings: `Told` is what it can do.

Run as ``python -m tests.cuda.program FD``, with a socket of JSON messages and descriptors as `processes.py` sends them.
"""

import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
from typing import Any

from cuda.bindings import driver

from trimsfs.server.sandbox import Identity, become, fence

_ACCESS = driver.CUmemAccess_flags
_FILE_DESCRIPTOR = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_MESSAGE_LIMIT = 1 << 16


class CallError(Exception):
    """A function of the driver has failed; its text is the name of the error."""


def call(name: str, *arguments: Any) -> Any:
    """What a function of the driver returns beside success. Raises CallError."""
    result, *values = getattr(driver, name)(*arguments)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise CallError(result.name)
    return values[0] if len(values) == 1 else values


def properties(device: int, *, exportable: bool) -> driver.CUmemAllocationProp:
    """Of memory for cuMemCreate."""
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = device
    if exportable:
        wanted.requestedHandleTypes = _FILE_DESCRIPTOR
    return wanted


class Told:
    """What tests call by name. Pointers and handles are integers, bytes are hexadecimal."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.sent: list[int] = []
        self._kept: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._outcomes: list[Any] = []

    def init(self) -> None:
        call("cuInit", 0)

    def start(self, device: int = 0) -> None:
        """Make the primary context of a device the thread's."""
        self.init()
        call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", device))

    def confine(self, uid: int) -> None:
        """Give up what a server of trimsfs gives up."""
        become(Identity(name="server", uid=uid, gid=uid))
        fence([])

    def devices(self) -> list[tuple[str, str, int]]:
        """Name, UUID and size of each."""
        self.init()
        found = []
        for device in range(call("cuDeviceGetCount")):
            name = call("cuDeviceGetName", 64, device).decode().rstrip(" \0")
            found.append((name, call("cuDeviceGetUuid", device).bytes.hex(), call("cuDeviceTotalMem", device)))
        return found

    def call(self, name: str, *arguments: Any) -> Any:
        """Any function that takes and returns numbers."""
        value = call(name, *arguments)
        return [int(one) for one in value] if isinstance(value, list) else int(value)

    def outcome(self, name: str, *arguments: Any) -> str:
        """The name of what a function returns."""
        result: str = getattr(driver, name)(*arguments)[0].name
        return result

    def write(self, pointer: int, content: str) -> None:
        data = bytes.fromhex(content)
        call("cuMemcpyHtoD", pointer, data, len(data))

    def read(self, pointer: int, size: int) -> str:
        data = bytearray(size)
        call("cuMemcpyDtoH", data, pointer, size)
        return data.hex()

    def ipc_handle(self, pointer: int) -> str:
        handle = call("cuIpcGetMemHandle", pointer)
        return ctypes.string_at(handle.getPtr(), 64).hex()

    def ipc_open(self, content: str) -> int:
        handle = driver.CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), bytes.fromhex(content), 64)
        return int(call("cuIpcOpenMemHandle", handle, 1))

    def granularity(self) -> int:
        option = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(call("cuMemGetAllocationGranularity", properties(0, exportable=True), option))

    def create(self, size: int, device: int = 0, *, exportable: bool = True) -> int:
        return int(call("cuMemCreate", size, properties(device, exportable=exportable), 0))

    def export(self, handle: int) -> None:
        """The descriptor goes to the test, and is closed here."""
        self.sent.append(call("cuMemExportToShareableHandle", handle, _FILE_DESCRIPTOR, 0))

    def import_(self) -> int:
        """Of the descriptor that came with the message."""
        return int(call("cuMemImportFromShareableHandle", self.received[0], _FILE_DESCRIPTOR))

    def map(self, handle: int, size: int, access: str = "PROT_READWRITE") -> int:
        """Map memory to addresses of its own, and release its handle."""
        pointer = int(call("cuMemAddressReserve", size, 0, 0, 0))
        call("cuMemMap", pointer, size, 0, handle, 0)
        call("cuMemRelease", handle)
        self.allow(pointer, size, access)
        return pointer

    def allow(self, pointer: int, size: int, access: str, device: int = 0) -> None:
        wanted = driver.CUmemAccessDesc()
        wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = device
        wanted.flags = getattr(_ACCESS, f"CU_MEM_ACCESS_FLAGS_{access}")
        call("cuMemSetAccess", pointer, size, [wanted], 1)

    def unmap(self, pointer: int, size: int) -> None:
        call("cuMemUnmap", pointer, size)
        call("cuMemAddressFree", pointer, size)

    def attribute(self, name: str, pointer: int) -> int:
        wanted = getattr(driver.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}")
        return int(call("cuPointerGetAttribute", wanted, pointer))

    def register(self, path: str | None, size: int, *, writable: bool = True, flags: int = 0) -> int:
        """Page-lock a mapping of a file; None is anonymous memory, a number a descriptor that came with the message."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        if path is None:
            mapping = mmap.mmap(-1, size)
        else:
            descriptor = os.open(path, os.O_RDWR)
            mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection)
        address = _address(mapping)
        self._kept.append(mapping)
        call("cuMemHostRegister", address, size, flags)
        return address

    def fill_host(self, address: int, value: int, size: int) -> None:
        """Put bytes somewhere: on an address of a device that is a fault, or is not."""
        ctypes.memset(address, value, size)

    def differing(self, address: int, value: int, size: int) -> int:
        """How many bytes of the host's memory are something else."""
        return size - ctypes.string_at(address, size).count(value)

    def read_host(self, address: int, size: int) -> str:
        return ctypes.string_at(address, size).hex()

    def aside(self, context: int, name: str, *arguments: Any) -> None:
        """Do another of these things in a thread of its own and do not wait, until `joined`."""

        def work() -> None:
            try:
                call("cuCtxSetCurrent", context)
                self._outcomes.append(getattr(self, name)(*arguments))
            except CallError as error:
                self._outcomes.append(str(error))

        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def joined(self) -> list[Any]:
        """What came of all that was done aside, in the order in which it ended."""
        while self._threads:
            self._threads.pop().join()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def thread_context(self) -> str:
        """What another thread, in which no context is current, gets."""
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(self.outcome("cuMemAlloc", 4096)))
        thread.start()
        thread.join()
        return found[0]

    def threads(self, count: int, rounds: int) -> list[str]:
        """Threads that allocate, copy and free at once, each on a stream of its own; what went wrong."""
        context = call("cuCtxGetCurrent")
        wrong: list[str] = []

        def work(number: int) -> None:
            try:
                call("cuCtxSetCurrent", context)
                stream = call("cuStreamCreate", 1)
                for turn in range(rounds):
                    data, back = bytes([number, turn]) * 50_000, bytearray(100_000)
                    pointer = call("cuMemAlloc", len(data))
                    call("cuMemcpyHtoDAsync", pointer, data, len(data), stream)
                    call("cuMemcpyDtoHAsync", back, pointer, len(data), stream)
                    call("cuStreamSynchronize", stream)
                    if back != data:
                        wrong.append(f"thread {number} read something else")
                    call("cuMemFree", pointer)
                call("cuStreamDestroy", stream)
            except CallError as error:
                wrong.append(str(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong

    def fork(self) -> list[str]:
        """What a child gets of cuMemGetInfo and of cuInit."""
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(theirs, f"{self.outcome('cuMemGetInfo')} {self.outcome('cuInit', 0)}".encode())
            os._exit(0)
        os.close(theirs)
        os.waitpid(child, 0)
        with open(ours) as pipe:
            return pipe.read().split()

    def fork_and_stay(self) -> int:
        """A child that outlives this process, for some seconds; it has begun to run when this returns."""
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(theirs, b"\n")
            signal.alarm(20)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
            os._exit(0)
        os.read(ours, 1)
        os.close(ours)
        os.close(theirs)
        return child


def _address(mapping: mmap.mmap) -> int:
    """Where a mapping is, which one that is read-only does not tell: it is the last that was made."""
    with contextlib.suppress(TypeError):
        return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    view = ctypes.py_object(mapping)
    buffer = (ctypes.c_char * 80)()  # a Py_buffer: its first field is the address
    ctypes.pythonapi.PyObject_GetBuffer(view, buffer, 0)
    return ctypes.c_void_p.from_buffer(buffer).value or 0


def main() -> None:
    """Do what comes until the test closes its end."""
    end = socket.socket(fileno=int(sys.argv[1]))
    told = Told()
    while True:
        data, told.received, _, _ = socket.recv_fds(end, _MESSAGE_LIMIT, 4)
        if not data:
            return
        name, arguments, options = json.loads(data)
        told.sent = []
        try:
            answer = {"value": getattr(told, name)(*arguments, **options)}
        except CallError as error:
            answer = {"error": str(error)}
        socket.send_fds(end, [json.dumps(answer).encode()], told.sent)
        for descriptor in (*told.sent, *told.received):
            os.close(descriptor)


if __name__ == "__main__":
    main()
