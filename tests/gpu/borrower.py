"""A program that uses copies as one without our client would: by what the mount tells, and the driver.

Run as ``python -m tests.gpu.borrower``; takes orders, each a line of JSON, and answers each with one.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from typing import Any

from trimsfs.extras.gpu import cuda
from trimsfs.fuse import _libfuse

GPU = struct.Struct("=48sIIQQ64s40s112s")
RECEIVE_TIMEOUT_S = 30
TRIES, TRY_INTERVAL_S = 40, 0.05
CROWD_S = 20
"""How long the threads of a crowd may take to be refused."""


class Borrower:
    """What this process has opened: a lease's descriptor, and the memory."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._connection: socket.socket | None = None
        self._memory: cuda.VmmMemory | cuda.IpcMemory | None = None
        self._nbytes = 0
        self._entered: cuda.Context | None = None

    def _enter(self, device: str) -> int:
        """Use a device in this process; its place."""
        ordinal = next(found.ordinal for found in cuda.devices() if found.uuid == device)
        if self._entered is None:
            self._entered = cuda.Context(ordinal)
            self._entered.enter()
        return ordinal

    def become(self, uid: int) -> dict[str, Any]:
        """Go on as another user, who may not read what this one has installed."""
        cuda.bindings()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return {}

    def rename(self) -> dict[str, Any]:
        """Have a name that is no text."""
        ctypes.CDLL(None).prctl(15, b"\xff\xfe", 0, 0, 0)
        return {}

    def interrupt(self, seconds: float) -> dict[str, Any]:
        """Get a signal again and again from now on."""
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        return {}

    def crowd(self, path: str, count: int, room: int) -> dict[str, Any]:
        """Open a control file in so many threads at once, for some of which there is *room*; how many were refused,
        with which error."""
        refused: list[int] = []

        def open_it() -> None:
            try:
                os.open(path, os.O_RDONLY)
            except OSError as error:
                refused.append(error.errno or 0)

        threads = [threading.Thread(target=open_it, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + CROWD_S
        while len(refused) < count - room and time.monotonic() < deadline:
            time.sleep(TRY_INTERVAL_S)
        time.sleep(1)  # in which no more are refused
        return {"refused": Counter(refused)}

    def again_and_again(self, path: str, device: str, count: int) -> dict[str, Any]:
        """Ask one open file for a copy many times; the tokens that came of it."""
        self._descriptor = os.open(path, os.O_RDONLY)
        tokens = set()
        for _ in range(count):
            asked = bytearray(GPU.pack(device.encode(), 0, 0, 0, 0, b"", b"", b""))
            fcntl.ioctl(self._descriptor, _libfuse.IOC_GPU, asked)
            tokens.add(GPU.unpack(asked)[6].split(b"\0")[0].decode())
        return {"tokens": sorted(tokens)}

    def control_file(self, path: str, *, use: bool = True) -> dict[str, Any]:
        """Open a control file, and, unless only the lease is wanted, what it tells of."""
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        told = self.again()
        if not use:
            return told
        answer = self._take(told)
        for _ in range(TRIES):  # another server has taken over since it was read: its token is another
            if "error" not in answer:
                break
            time.sleep(TRY_INTERVAL_S)
            told = self.again()
            answer = self._take(told)
        return answer if "error" in answer else told

    def again(self) -> dict[str, Any]:
        """Read the control file once more, from its start."""
        text = b""
        while piece := os.pread(self._descriptor, 1 << 20, len(text)):
            text += piece
        told: dict[str, Any] = json.loads(text)
        return told

    def _take(self, told: dict[str, Any]) -> dict[str, Any]:
        if told["memory"] == "ipc":
            return self.handle(told["device"], told["ipc_handle"], told["size"], told["nbytes"])
        return self.socket(told["device"], told["socket"], told["token"], told["nbytes"])

    def ioctl(self, path: str, device: str, memory: int) -> dict[str, Any]:
        """Ask an open model file for a copy, and use it."""
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        asked = bytearray(GPU.pack(device.encode(), memory, 0, 0, 0, b"", b"", b""))
        fcntl.ioctl(self._descriptor, _libfuse.IOC_GPU, asked)
        _, _, _, size, nbytes, handle, token, address = GPU.unpack(asked)
        if memory:
            return self.handle(device, handle.hex(), size, nbytes)
        return self.socket(device, address.split(b"\0")[0].decode(), token.split(b"\0")[0].decode(), nbytes)

    def xattr(self, path: str, device: str, size: int, nbytes: int) -> dict[str, Any]:
        """Use the copy whose handle is an attribute of the file."""
        handle = os.getxattr(path, f"user.trims.gpu.{device}.ipc_handle")
        return self.handle(device, handle.hex(), size, nbytes)

    def handle(self, device: str, handle: str, size: int, nbytes: int) -> dict[str, Any]:
        """Use memory by its legacy handle."""
        self._enter(device)
        self._memory = cuda.IpcMemory.open(bytes.fromhex(handle), size)
        self._nbytes = nbytes
        return {"nbytes": nbytes}

    def socket(self, device: str, address: str, token: str, nbytes: int, *, keep: bool = False) -> dict[str, Any]:
        """Use memory by a descriptor from the socket; *keep* the connection, which is a lease."""
        ordinal = self._enter(device)
        if not address:
            return {"error": "there is no socket, or not yet"}
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(RECEIVE_TIMEOUT_S)
        connection.connect(address)
        try:
            connection.send(json.dumps({"token": token}).encode())
            data, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
        except ConnectionError:
            data, descriptors = b"", []
        if not data:
            connection.close()
            return {"error": "the server has ended before it answered"}
        told: dict[str, Any] = json.loads(data)
        if descriptors:
            self._memory = cuda.VmmMemory.adopt(ordinal, told["size"], descriptors[0])
            os.close(descriptors[0])
            self._nbytes = nbytes
        if keep:
            self._connection = connection
        else:
            connection.close()
        return told

    def digest(self) -> dict[str, Any]:
        """Of the bytes on the device."""
        assert self._memory is not None
        content = ctypes.create_string_buffer(self._nbytes)
        stream = cuda.Stream()
        stream.to_host(ctypes.addressof(content), self._memory.address, self._nbytes)
        stream.synchronize()
        stream.close()
        return {"digest": hashlib.sha256(content.raw[: self._nbytes]).hexdigest()}

    def write(self) -> dict[str, Any]:
        """Have the driver write to the memory."""
        assert self._memory is not None
        content = ctypes.create_string_buffer(b"overwritten")
        stream = cuda.Stream()
        stream.to_device(self._memory.address, ctypes.addressof(content), 11)
        stream.synchronize()
        return {}

    def store(self) -> dict[str, Any]:
        """Write to the memory as a kernel would: by its address."""
        assert self._memory is not None
        ctypes.memset(self._memory.address, 1, 1)
        return {}

    def close(self) -> dict[str, Any]:
        """Let go of the memory, and then of the lease."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._connection is not None:
            self._connection.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        return {}


def main() -> None:
    """Carry out orders until there are no more."""
    borrower = Borrower()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(borrower, order.pop("do"))(**order)
        except (OSError, cuda.CudaError) as error:
            answer = {
                "error": str(error),
                "errno": getattr(error, "errno", None),
                "name": getattr(error, "name", None),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
