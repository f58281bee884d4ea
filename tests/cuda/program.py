"""A process that calls the CUDA driver as a test tells it, through cuda-bindings: `Told` is what it can do.

Run as ``python -m tests.cuda.program FD``, with a socket of JSON messages and descriptors as `processes.py` sends them.
"""

import ctypes
import json
import mmap
import os
import socket
import sys
import threading
from typing import Any

from cuda.bindings import driver

from trimsfs.extras.gpu import cuda

_MESSAGE_LIMIT = 1 << 16
_FILE_DESCRIPTOR = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


class Told:
    """What tests call by name. Pointers and handles are integers, bytes are hexadecimal."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.sent: list[int] = []
        self._kept: list[mmap.mmap] = []

    def devices(self) -> list[tuple[str, str, int]]:
        """Name, UUID and size of each."""
        return [(found.name, found.uuid, found.total) for found in cuda.devices()]

    def start(self, device: int = 0) -> None:
        """Make the primary context of a device the thread's."""
        cuda.call("cuInit", 0)
        cuda.call("cuCtxSetCurrent", cuda.call("cuDevicePrimaryCtxRetain", device))

    def call(self, name: str, *arguments: Any) -> Any:
        """Any function that takes and returns numbers."""
        value = cuda.call(name, *arguments)
        return [int(one) for one in value] if isinstance(value, tuple) else None if value is None else int(value)

    def outcome(self, name: str, *arguments: Any) -> str:
        """The name of what a function returns, without its beginning."""
        result: str = getattr(driver, name)(*arguments)[0].name
        return result.removeprefix("CUDA_").removeprefix("ERROR_")

    def write(self, pointer: int, content: str) -> None:
        data = bytes.fromhex(content)
        cuda.call("cuMemcpyHtoD", pointer, data, len(data))

    def read(self, pointer: int, size: int) -> str:
        data = bytearray(size)
        cuda.call("cuMemcpyDtoH", data, pointer, size)
        return data.hex()

    def ipc_handle(self, pointer: int) -> str:
        handle = cuda.call("cuIpcGetMemHandle", pointer)
        return ctypes.string_at(handle.getPtr(), 64).hex()

    def ipc_open(self, content: str) -> int:
        return cuda.IpcMemory.open(bytes.fromhex(content), 0).address

    def create(self, size: int) -> int:
        """Memory to be exported, of the first device."""
        return int(cuda.call("cuMemCreate", size, cuda._properties(0), 0))

    def export(self, handle: int) -> None:
        """The descriptor goes to the test, and is closed here."""
        self.sent.append(cuda.call("cuMemExportToShareableHandle", handle, _FILE_DESCRIPTOR, 0))

    def import_(self) -> int:
        """Of the descriptor that came with the message."""
        return int(cuda.call("cuMemImportFromShareableHandle", self.received[0], _FILE_DESCRIPTOR))

    def map(self, handle: int, size: int, access: str = "PROT_READWRITE") -> int:
        """Map memory to addresses of its own, and release its handle."""
        pointer = int(cuda.call("cuMemAddressReserve", size, 0, 0, 0))
        cuda.call("cuMemMap", pointer, size, 0, handle, 0)
        cuda.call("cuMemRelease", handle)
        wanted = driver.CUmemAccessDesc()
        wanted.location = cuda._location(0)
        wanted.flags = getattr(driver.CUmemAccess_flags, f"CU_MEM_ACCESS_FLAGS_{access}")
        cuda.call("cuMemSetAccess", pointer, size, [wanted], 1)
        return pointer

    def unmap(self, pointer: int, size: int) -> None:
        cuda.call("cuMemUnmap", pointer, size)
        cuda.call("cuMemAddressFree", pointer, size)

    def register(self, path: str, size: int) -> int:
        """Page-lock a mapping of a file."""
        with open(path, "r+b") as file:
            mapping = mmap.mmap(file.fileno(), size)
        self._kept.append(mapping)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        cuda.register(address, size)
        return address

    def fill_host(self, address: int, value: int, size: int) -> None:
        """Put bytes somewhere: on an address of a device that is a fault, or is not."""
        ctypes.memset(address, value, size)

    def read_host(self, address: int, size: int) -> str:
        return ctypes.string_at(address, size).hex()

    def threads(self, count: int, rounds: int) -> list[str]:
        """Threads that allocate, copy and free at once, each on a stream of its own; what went wrong."""
        context = cuda.call("cuCtxGetCurrent")
        wrong: list[str] = []

        def work(number: int) -> None:
            try:
                cuda.call("cuCtxSetCurrent", context)
                stream = cuda.call("cuStreamCreate", 1)
                for turn in range(rounds):
                    data, back = bytes([number, turn]) * 50_000, bytearray(100_000)
                    pointer = cuda.call("cuMemAlloc", len(data))
                    cuda.call("cuMemcpyHtoDAsync", pointer, data, len(data), stream)
                    cuda.call("cuMemcpyDtoHAsync", back, pointer, len(data), stream)
                    cuda.call("cuStreamSynchronize", stream)
                    if back != data:
                        wrong.append(f"thread {number} read something else")
                    cuda.call("cuMemFree", pointer)
                cuda.call("cuStreamDestroy", stream)
            except cuda.CudaError as error:
                wrong.append(str(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong


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
        except cuda.CudaError as error:
            answer = {"error": error.name}
        socket.send_fds(end, [json.dumps(answer).encode()], told.sent)
        for descriptor in (*told.sent, *told.received):
            os.close(descriptor)


if __name__ == "__main__":
    main()
