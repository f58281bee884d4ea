"""Points at which a process is killed: the system calls by which it changes files, counted by `points.c`."""

import enum
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("points.c")
_HEAD = struct.Struct("=5q")
_SIZE = _HEAD.size + 216
COMPILE_TIMEOUT_S = 60


class How(enum.IntEnum):
    """What happens at a point."""

    KILL = 0
    TEAR = 1
    """Half of what is written there is written before."""
    POWER = 2
    """The file system stops, and loses what it has not been told to keep."""


def built(directory: Path) -> Path:
    library = directory / "points.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-O2", "-fPIC", "-shared"]
    subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(library), "-ldl"], check=True, timeout=COMPILE_TIMEOUT_S)
    library.chmod(0o755)
    return library


class Plan:
    """When the next one is to die. All processes that have loaded the library share it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.fchmod(self._file, 0o666)  # servers are not root
        os.ftruncate(self._file, _SIZE)
        self._map = mmap.mmap(self._file, _SIZE)

    def close(self) -> None:
        """Nobody is told anything any more."""
        self._map.close()
        os.close(self._file)

    @property
    def calls(self) -> int:
        """Calls counted since it was set."""
        calls, *_ = _HEAD.unpack_from(self._map)
        return int(calls)

    def set(
        self, at: int, how: How = How.KILL, *, synced_at: int = 0, victim: int = 0, directory: Path | None = None
    ) -> None:
        """Count anew, and kill before the call of number *at* (0: never): *victim*, or whoever makes it.

        All that is on the file system of *directory* is brought to the disk before the call of number *synced_at*.
        """
        self._map[_HEAD.size :] = os.fsencode(directory or "").ljust(_SIZE - _HEAD.size, b"\0")
        self._map[8 : _HEAD.size] = struct.pack("=4q", at, how, synced_at, victim)
        self._map[:8] = bytes(8)


@contextmanager
def plan_in(directory: Path) -> Iterator[tuple[Plan, dict[str, str]]]:
    """A plan, and the environment of programs that keep to it."""
    plan = Plan(directory / "plan")
    try:
        yield plan, {"LD_PRELOAD": str(built(directory)), "CRASH_PLAN": str(directory / "plan")}
    finally:
        plan.close()
