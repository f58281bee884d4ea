"""Tells how many threads this process has when it forks: a fork has one, and what the others held stays locked in it.

Libraries that end their threads for a fork do so in handlers that run during it, so nothing before it can tell.
"""

import ctypes
import os
import struct
import sys
import time
from contextlib import suppress

PATIENCE_S, PAUSE_S = 0.05, 0.0005
"""The kernel counts a thread for a moment after it has been joined."""
_OPENMP = ("libgomp", "libomp", "libiomp")
_PAUSE_HARD = 2
_STACK = 1 << 16
"""So much of a thread's stack is looked at, in bytes."""
_C_LIBRARIES = ("libc.", "libc-", "libpthread", "libstdc++", "ld-linux", "ld-musl", "libpython")
_handler = ctypes.CFUNCTYPE(None)


class ThreadCount:
    """Counts at each fork of this process. Make it before any library is imported: its handler then runs last."""

    def __init__(self) -> None:
        self._counts = True
        self.at_fork = 1
        """The threads that the process had when it forked last."""
        self.names: list[str] = []
        """What the threads besides the main one are called."""
        library = ctypes.CDLL(None)
        try:
            register = getattr(library, "__register_atfork")
            arguments: tuple[None, ...] = (None, None, None)
        except AttributeError:  # musl
            register, arguments = library.pthread_atfork, (None, None)
        self._prepare = _handler(self._count)
        register(self._prepare, *arguments)

    def end(self) -> None:
        """Count no more: this process is a fork, whose own forks concern nobody."""
        self._counts = False

    def _count(self) -> None:
        if not self._counts:
            return
        give_up_at = time.monotonic() + PATIENCE_S
        while (count := len(os.listdir("/proc/self/task"))) > 1 and time.monotonic() < give_up_at:
            time.sleep(PAUSE_S)
        self.at_fork = count
        self.names = names() if count > 1 else []

    def try_fork(self) -> int:
        """Fork a process that ends at once; how many threads this one had. Raises OSError."""
        end_idle_pools()
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return self.at_fork


def names() -> list[str]:
    """Each thread of this process besides the main one: its name in Python, a library that started it, or its name."""
    threading = sys.modules.get("threading")
    known = {str(each.native_id): each.name for each in threading.enumerate()} if threading else {}
    threads = [thread for thread in os.listdir("/proc/self/task") if int(thread) != os.getpid()]
    return sorted(known.get(thread) or _starter(thread) for thread in threads)


def _starter(thread: str) -> str:
    """The first library on a waiting thread's stack that is not the C or C++ library: its function is what runs."""
    name = "a thread that has ended"
    try:
        with open(f"/proc/self/task/{thread}/comm") as file:
            name = file.read().strip()
        with open(f"/proc/self/task/{thread}/syscall") as file:
            stack_pointer = int(file.read().split()[-2], 16)
        with open("/proc/self/maps", errors="surrogateescape") as maps:
            mappings = [_Mapping(line) for line in maps]
        stack = next(each for each in mappings if each.start <= stack_pointer < each.end)
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(stack_pointer)
            words = memory.read(min(stack.end - stack_pointer, _STACK)) or b""
    except (OSError, ValueError, IndexError, StopIteration):
        return name
    code = [each for each in mappings if each.is_code]
    found = name
    for (address,) in struct.iter_unpack("@N", words[: len(words) - len(words) % struct.calcsize("@N")]):
        for each in code:
            if each.start <= address < each.end:
                found = each.library
    return found


class _Mapping:
    """A line of /proc/self/maps."""

    def __init__(self, line: str) -> None:
        fields = line.split(None, 5)
        self.start, self.end = (int(address, 16) for address in fields[0].split("-"))
        self.library = os.path.basename(fields[5].strip()) if len(fields) > 5 else ""
        self.is_code = "x" in fields[1] and ".so" in self.library and not self.library.startswith(_C_LIBRARIES)


def end_idle_pools() -> None:
    """Have OpenMP end the threads that it keeps for the next parallel region; it starts them again when needed."""
    if len(os.listdir("/proc/self/task")) == 1:
        return
    with open("/proc/self/maps") as maps:
        paths = {line.split(None, 5)[5].strip() for line in maps if any(name in line for name in _OPENMP)}
    for path in paths:
        with suppress(OSError, AttributeError):  # a file of another kind, or OpenMP before 5.0
            ctypes.CDLL(path, mode=os.RTLD_NOLOAD).omp_pause_resource_all(_PAUSE_HARD)
