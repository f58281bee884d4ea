"""The memory of emulated devices: who holds what, and until when."""

import os
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fcntl import F_ADD_SEALS, F_SEAL_GROW, fcntl

from .registers import HANDLE_SIZE, Result

STALE = 0xA5
"""What is in every byte of new memory: no driver promises zeros, and true ones show what others have left there."""

_PAGE = 4096
_STALE = bytes([STALE]) * (2 << 20)

Identity = tuple[int, int]
"""Device and inode number of a descriptor."""


class RefusedError(Exception):
    """The answer is an error."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.name)
        self.result = result


@dataclass(eq=False, slots=True)
class Process:
    """A connection, which is the life of what it holds."""

    pid: int
    held: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Device memory at one moment, and which processes hold it."""

    number: int
    device: int
    nbytes: int
    holders: tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Memory:
    number: int
    device: int
    nbytes: int
    file: int
    owner: Process | None  # None once cuMemCreate's is nobody's in particular
    handle: bytes
    exports: set[Identity] = field(default_factory=set)
    holders: set[Process] = field(default_factory=set)


class Memory:
    """Allocations of all devices. Not for several threads at once."""

    def __init__(self, room: Callable[[int], int]) -> None:
        """*room*: the bytes of a device that are not used by others."""
        self._room = room
        self._memories: dict[int, _Memory] = {}
        self._exports: dict[Identity, _Memory] = {}
        self._made = 0

    def allocate(self, process: Process, device: int, nbytes: int, *, legacy: bool) -> tuple[int, int]:
        """New memory: its number and file. *legacy* memory ends with the process. Raises RefusedError."""
        if self.used(device) + _charge(nbytes) > self._room(device):
            raise RefusedError(Result.OUT_OF_MEMORY)
        file = os.memfd_create(f"emulated device {device}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, _charge(nbytes))
        _fill(file, _charge(nbytes))
        fcntl(file, F_ADD_SEALS, F_SEAL_GROW)  # cut to nothing, it stays nothing, whoever writes to it
        self._made += 1
        handle = secrets.token_bytes(HANDLE_SIZE)
        owner = process if legacy else None
        memory = _Memory(self._made, device, nbytes, file, owner, handle)
        self._memories[memory.number] = memory
        self._hold(process, memory)
        return memory.number, file

    def handle(self, process: Process, number: int) -> bytes:
        """The bytes by which others open what this process has allocated. Raises RefusedError."""
        memory = self._memories.get(number)
        if memory is None or memory.owner is not process:
            raise RefusedError(Result.INVALID_VALUE)
        return memory.handle

    def open(self, process: Process, device: int, handle: bytes) -> tuple[int, int, int]:
        """What a handle leads to: number, size, file. Raises RefusedError."""
        found = [memory for memory in self._memories.values() if memory.owner is not None and memory.handle == handle]
        if not found:
            raise RefusedError(Result.INVALID_VALUE)
        memory = found[0]
        if memory.owner is process:
            raise RefusedError(Result.INVALID_CONTEXT)
        if memory.device != device:
            raise RefusedError(Result.PEER_ACCESS_UNSUPPORTED)
        self._hold(process, memory)
        return memory.number, memory.nbytes, memory.file

    def export(self, process: Process, number: int, identity: Identity) -> None:
        """Have memory live while a descriptor of this identity is open anywhere. Raises RefusedError."""
        memory = self._memories.get(number)
        if memory is None or memory.owner is not None or process not in memory.holders:
            raise RefusedError(Result.INVALID_VALUE)
        memory.exports.add(identity)
        self._exports[identity] = memory

    def exported(self, identity: Identity) -> tuple[int, int, int, int]:
        """What was exported so: number, device, size, file. Raises RefusedError."""
        memory = self._exports.get(identity)
        if memory is None:
            raise RefusedError(Result.INVALID_VALUE)
        return memory.number, memory.device, memory.nbytes, memory.file

    def import_(self, process: Process, number: int) -> None:
        """Have a process hold what it was told of."""
        self._hold(process, self._memories[number])

    def closed(self, identity: Identity) -> None:
        """Nobody has an export any more."""
        memory = self._exports.pop(identity, None)
        if memory is not None:
            memory.exports.discard(identity)
            self._end_unless_held(memory)

    def drop(self, process: Process, number: int) -> None:
        """Take back one hold of a process; what it does not hold, or what is gone, is none."""
        memory = self._memories.get(number)
        if process.held[number] > 0:
            process.held[number] -= 1
        if memory is not None and process.held[number] == 0:
            memory.holders.discard(process)
            self._end_unless_held(memory)

    def leave(self, process: Process) -> None:
        """The process is gone, and with it what it held."""
        for memory in list(self._memories.values()):
            memory.holders.discard(process)
            self._end_unless_held(memory, process)

    def lose(self, device: int) -> None:
        """The device is gone, with all that was in it."""
        for memory in [memory for memory in self._memories.values() if memory.device == device]:
            self._end(memory)

    def used(self, device: int) -> int:
        """Bytes allocated on a device."""
        return sum(_charge(memory.nbytes) for memory in self._memories.values() if memory.device == device)

    def file(self, number: int) -> int:
        """The memfd of an allocation. Raises KeyError."""
        return self._memories[number].file

    def allocations(self) -> list[Allocation]:
        """What there is, the oldest first."""
        return [
            Allocation(
                number=memory.number,
                device=memory.device,
                nbytes=memory.nbytes,
                holders=tuple(sorted(process.pid for process in memory.holders)),
            )
            for memory in self._memories.values()
        ]

    def close(self) -> None:
        """Give all memory back."""
        for memory in list(self._memories.values()):
            self._end(memory)

    def _hold(self, process: Process, memory: _Memory) -> None:
        process.held[memory.number] += 1
        memory.holders.add(process)

    def _end_unless_held(self, memory: _Memory, gone: Process | None = None) -> None:
        if memory.owner is not None:
            held = memory.owner in memory.holders and memory.owner is not gone
        else:
            held = bool(memory.holders or memory.exports)
        if not held:
            self._end(memory)

    def _end(self, memory: _Memory) -> None:
        """Whoever still maps it loses it: on a true device it would be somebody else's memory by now."""
        if self._memories.pop(memory.number, None) is not None:
            for identity in memory.exports:
                self._exports.pop(identity, None)
            os.ftruncate(memory.file, 0)
            os.close(memory.file)


def _fill(file: int, size: int) -> None:
    for offset in range(0, size, len(_STALE)):
        os.pwrite(file, _STALE[: size - offset], offset)


def _charge(nbytes: int) -> int:
    """What memory takes, in pages of the host. A true device gives 2 MiB at a time, and cuMemAlloc divides them."""
    return -(-nbytes // _PAGE) * _PAGE
