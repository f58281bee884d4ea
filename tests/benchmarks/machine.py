"""The machine: what it is, its memory, and what processes cost it."""

import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.benchmarks.contenders import Mount, inherited
from tests.services import installed

SAMPLE_INTERVAL_S = 0.1
TOUCH_LIMIT_S = 120


def facts() -> dict[str, str | int]:
    """What the report says of where it was made."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "trimsfs": version("trimsfs"),
    }


def peers() -> dict[str, str]:
    """The versions of what trimsfs is compared with."""
    return {
        "rclone": _first_line(installed("rclone"), "version"),
        "juicefs": _first_line(installed("juicefs"), "version"),
        "s3fs": _first_line("s3fs", "--version"),
        "seaweedfs": _first_line(installed("weed"), "version"),
    }


def own_memory_bytes(pids: Iterable[int], cache: Path) -> int:
    """PSS of processes and all their descendants, in bytes, without the files in *cache* that they map.

    Those are page cache, which is there for all and is measured as such.
    """
    total = 0
    for pid in family(pids):
        counts = False
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024 if counts else 0
                elif re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    counts = str(cache) not in line
    return total


class Cost:
    """CPU seconds and peak memory of a mount's processes and all their descendants while the context lasts.

    Memory is sampled, which costs the processes a little: not for runs whose time is compared.
    """

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._cpu_before_s = 0.0
        self.cpu_s = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._cpu_before_s = cpu_s(self._mount.pids)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self.cpu_s = cpu_s(self._mount.pids) - self._cpu_before_s

    def _sample(self) -> None:
        while not self._ended.is_set():
            self.peak_bytes = max(self.peak_bytes, own_memory_bytes(self._mount.pids, self._mount.cache))
            self._ended.wait(SAMPLE_INTERVAL_S)


def family(pids: Iterable[int]) -> set[int]:
    """The processes and all their descendants, as far as they are there."""
    found: set[int] = set()
    left = list(pids)
    while left:
        pid = left.pop()
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                left.extend(map(int, (task / "children").read_text().split()))
            found.add(pid)
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time of processes, their descendants and those of their children that have ended, in seconds."""
    ticks = 0
    for pid in family(pids):
        with suppress(OSError):
            # After the name, which may hold anything, the third field of proc_pid_stat(5) comes first.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def available_bytes() -> int:
    """What the kernel says could be had without swapping; what is cached counts."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise LookupError("MemAvailable")


def touch_memory(size: int) -> None:
    """Have a program write so many bytes, at most half of what is available, and end.

    A virtual machine gets memory from its host only when it first writes there, and gives it back some seconds after it
    is free. Who runs next would pay for that, or not.
    """
    size = min(size, available_bytes() // 2)
    code = f"import mmap; mmap.mmap(-1, {size}, flags={mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TOUCH_LIMIT_S)


def settle() -> None:
    """Give file systems time for what they do after a file is closed, and the disk time to write."""
    time.sleep(1)
    os.sync()


def missing_programs() -> list[str]:
    """The programs that are measured or needed and are not installed."""
    beside = [name for name in ("rclone", "juicefs", "weed") if not Path(installed(name)).exists()]
    return [*beside, *(name for name in ("s3fs", "setpriv", "umount") if shutil.which(name) is None)]


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env=inherited())
    return done.stdout.splitlines()[0]
