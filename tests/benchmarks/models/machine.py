"""The whole machine: how busy it is, and how much of its memory is taken."""

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLE_INTERVAL_S = 0.02
WINDOW_S = 0.25
QUIET_SHARE = 0.1
"""Of one core: so busy is a machine on which nothing is done."""
QUIET_WINDOWS = 2
_IDLE = (3, 4)
_GUEST = 8


def busy_s() -> float:
    """Processor time of all that the machine has done, in seconds: programs, servers, endpoint, kernel."""
    ticks = list(map(int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:]))
    counted = sum(value for place, value in enumerate(ticks[:_GUEST]) if place not in _IDLE)
    return counted / os.sysconf("SC_CLK_TCK")


def wait_quiet(limit_s: float) -> None:
    """Return once nothing is done on the machine any more, or after so many seconds."""
    deadline, quiet = time.monotonic() + limit_s, 0
    while quiet < QUIET_WINDOWS and time.monotonic() < deadline:
        before = busy_s()
        time.sleep(WINDOW_S)
        quiet = quiet + 1 if busy_s() - before < QUIET_SHARE * WINDOW_S else 0


def available_bytes() -> int:
    """What the kernel says could be had without swapping; what is cached counts."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise LookupError("MemAvailable")


class LowWater:
    """By how much the memory that is available was less than at the begin, at the worst moment of the context."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._before = self._least = available_bytes()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def taken(self) -> int:
        """Bytes so far."""
        return max(0, self._before - self._least)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_INTERVAL_S):
            self._least = min(self._least, available_bytes())
