"""The kernel driver of emulated CUDA devices: no GPU, but memory that processes truly share and that it counts.

A process is a connection: what it holds goes with it, however it ends. Device memory is memfds full of stale bytes,
handed out with the answers. An exported handle is one end of a pipe, so that it is seen here when the last process
closes it, whether that process knows of CUDA or not.
"""

import array
import contextlib
import ctypes
import mmap
import os
import select
import selectors
import socket
import struct
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from .memory import Allocation, Identity, Memory, Process, RefusedError
from .registers import DEVICES_LIMIT, VERSION, DeviceRegisters, Message, Registers, Result, Verb

_FD = struct.Struct("i")
_CREDENTIALS = struct.Struct("3i")


class Device:
    """An emulated device: its knobs and read-outs. Attributes that are set act at once, in all processes."""

    def __init__(self, number: int, registers: DeviceRegisters, kernel: "KernelDriver") -> None:
        self.number = number
        self.others = 0
        """Bytes that somebody outside of CUDA's sight uses."""
        self._registers = registers
        self._kernel = kernel

    @property
    def uuid(self) -> str:
        """As nvidia-smi and CUDA_VISIBLE_DEVICES have it."""
        return f"GPU-{uuid.UUID(bytes=bytes(self._registers.uuid))}"

    @property
    def total(self) -> int:
        """Bytes of memory."""
        total: int = self._registers.total
        return total

    @property
    def used(self) -> int:
        """Bytes that are allocated, without those of others."""
        return self._kernel.used(self.number)

    @property
    def copies(self) -> int:
        """Copies that have begun."""
        copies: int = self._registers.copies
        return copies

    @property
    def bytes_to_device(self) -> int:
        """Bytes copied from hosts' memory so far."""
        count: int = self._registers.bytes_to_device
        return count

    def allocations(self) -> list[Allocation]:
        """What is allocated, the oldest first."""
        return [allocation for allocation in self._kernel.allocations() if allocation.device == self.number]

    def slow(self, *, seconds_per_mib: float = 0) -> None:
        """Have copies take so long, also those under way."""
        self._registers.ps_per_byte = round(seconds_per_mib * 1e12 / (1 << 20))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Copies stand still meanwhile."""
        self._registers.paused = 1
        try:
            yield
        finally:
            self._registers.paused = 0

    def lose(self) -> None:
        """Take the device away with all that is in it. Contexts on it fail for good; processes that start later do not
        see it."""
        self._registers.lost = Result.UNKNOWN
        self._kernel.lose(self.number)

    def restore(self) -> None:
        """Give the device back, empty."""
        self._registers.lost = 0


class KernelDriver:
    """Devices of the given sizes, for processes that are given the environment of `tests.cuda`. A context manager."""

    def __init__(self, directory: Path, sizes: Sequence[int]) -> None:
        """*directory*: where its socket is to be; all users may connect."""
        assert 0 < len(sizes) <= DEVICES_LIMIT
        self.path = directory / "emulated-cuda.sock"
        self._page = os.memfd_create("emulated registers", os.MFD_CLOEXEC)
        os.ftruncate(self._page, ctypes.sizeof(Registers))
        self._registers = Registers.from_buffer(mmap.mmap(self._page, ctypes.sizeof(Registers)))
        self._registers.version, self._registers.devices = VERSION, len(sizes)
        self.devices = [self._device(number, size) for number, size in enumerate(sizes)]
        self._memory = Memory(lambda number: self.devices[number].total - self.devices[number].others)
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._processes: dict[socket.socket, Process] = {}
        self._pipes: dict[int, Identity] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stop, self._stopped = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="emulated CUDA kernel driver", daemon=True)

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self.path.chmod(0o777)
        self._listener.listen(128)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stopped)
        self._thread.join()
        for process in list(self._processes):
            self._leave(process)
        for pipe in list(self._pipes):
            self._close_pipe(pipe)
        self._memory.close()
        self._selector.close()
        self._listener.close()
        self.path.unlink()
        os.close(self._stop)
        os.close(self._page)

    def allocations(self) -> list[Allocation]:
        """What is allocated now, on all devices, the oldest first."""
        with self._lock:
            self._sweep()
            return self._memory.allocations()

    def used(self, device: int) -> int:
        """Bytes that are allocated now on a device."""
        with self._lock:
            self._sweep()
            return self._memory.used(device)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of an allocation, as they are."""
        with self._lock:
            return os.pread(self._memory.file(number), size, offset)

    def flip(self, number: int, offset: int) -> None:
        """Invert the bits of one byte of an allocation: memory that has gone bad."""
        with self._lock:
            (before,) = self.read(number, offset, 1)
            os.pwrite(self._memory.file(number), bytes([before ^ 0xFF]), offset)

    def lose(self, device: int) -> None:
        """Everything in a device is gone."""
        with self._lock:
            self._memory.lose(device)

    def _device(self, number: int, size: int) -> Device:
        registers = self._registers.device[number]
        registers.uuid[:] = uuid.uuid4().bytes
        registers.name = f"Emulated device {number}, no GPU".encode()
        registers.total = size
        return Device(number, registers, self)

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                with self._lock:
                    if key.fileobj == self._stop:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket):
                        self._answer(key.fileobj)
                    elif key.fd in self._pipes:
                        self._look_at(key.fd)

    def _accept(self) -> None:
        end, _ = self._listener.accept()
        pid, _, _ = _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        self._processes[end] = Process(pid)
        self._selector.register(end, selectors.EVENT_READ)

    def _leave(self, end: socket.socket) -> None:
        self._memory.leave(self._processes.pop(end))
        self._selector.unregister(end)
        end.close()

    def _close_pipe(self, pipe: int) -> None:
        self._memory.closed(self._pipes.pop(pipe))
        self._selector.unregister(pipe)
        os.close(pipe)

    def _look_at(self, pipe: int) -> None:
        """A pipe that nobody can read from is an export that nobody has."""
        if _has_ended(pipe):
            self._close_pipe(pipe)

    def _sweep(self) -> None:
        """Do first what is only not known of yet: that a process is gone, or an export is closed."""
        for end in [end for end in self._processes if _has_ended(end.fileno())]:
            self._leave(end)
        for pipe in list(self._pipes):
            self._look_at(pipe)

    def _answer(self, end: socket.socket) -> None:
        process = self._processes.get(end)
        if process is None:  # it has been swept away
            return
        try:
            data, ancillary, _, _ = end.recvmsg(ctypes.sizeof(Message), socket.CMSG_SPACE(_FD.size))
        except OSError:
            data, ancillary = b"", []
        received = array.array("i")
        for _, _, content in ancillary:
            received.frombytes(content)
        try:
            if len(data) != ctypes.sizeof(Message):
                self._leave(end)
                return
            self._reply(end, process, Message.from_buffer_copy(data), received)
        finally:
            for descriptor in received:
                os.close(descriptor)

    def _reply(self, end: socket.socket, process: Process, message: Message, received: Sequence[int]) -> None:
        sent: int | None = None
        try:
            sent = self._do(process, message, received)
            message.what = Result.SUCCESS
        except RefusedError as refused:
            message.what = refused.result
        rights = [] if sent is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sent]))]
        with contextlib.suppress(OSError):  # it has just died, which is told next
            end.sendmsg([bytes(message)], rights)
        if sent is not None:
            os.close(sent)

    def _do(self, process: Process, message: Message, received: Sequence[int]) -> int | None:
        """Do what is asked. The message becomes the answer, and the descriptor goes with it."""
        file = None
        match message.what:
            case Verb.HELLO:
                file = self._page
            case Verb.INFO:
                self._sweep()
                device = self._device_of(message)
                message.more = device.total
                message.size = max(0, device.total - device.others - self._memory.used(device.number))
            case Verb.ALLOCATE | Verb.CREATE as verb:
                self._sweep()
                if process not in self._processes.values():  # it has died since it asked
                    raise RefusedError(Result.DEVICE_UNAVAILABLE)
                number, legacy = self._device_of(message).number, verb == Verb.ALLOCATE
                message.number, file = self._memory.allocate(process, number, message.size, legacy=legacy)
            case Verb.DROP:
                self._memory.drop(process, message.number)
            case Verb.EXPORT:
                return self._export(process, message)
            case Verb.IMPORT if len(received) == 1:
                message.number, number, message.size, file = self._memory.exported(_identity(received[0]))
                message.device = self._checked(number).number
                self._memory.import_(process, message.number)
            case Verb.IPC_GET:
                message.handle[:] = self._memory.handle(process, message.number)
            case Verb.IPC_OPEN:
                number = self._device_of(message).number
                message.number, message.size, file = self._memory.open(process, number, bytes(message.handle))
            case _:
                raise RefusedError(Result.INVALID_VALUE)
        return None if file is None else os.dup(file)

    def _device_of(self, message: Message) -> Device:
        if not 0 <= message.device < len(self.devices):
            raise RefusedError(Result.INVALID_DEVICE)
        return self._checked(message.device)

    def _checked(self, number: int) -> Device:
        lost = self._registers.device[number].lost
        if lost:
            raise RefusedError(Result(lost))
        return self.devices[number]

    def _export(self, process: Process, message: Message) -> int:
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        try:
            self._memory.export(process, message.number, _identity(ours))
        except RefusedError:
            os.close(theirs)
            os.close(ours)
            raise
        self._pipes[ours] = _identity(ours)
        self._selector.register(ours, selectors.EVENT_READ)  # never readable: only its error is told
        return theirs


def _identity(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _has_ended(descriptor: int) -> bool:
    """Whether the other end of a pipe or connection is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))
