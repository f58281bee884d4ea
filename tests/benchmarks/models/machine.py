"""The whole machine: how busy it is, and programs that compute on it."""

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.children import Child
from tests.benchmarks.machine import cpu_s
from tests.benchmarks.models.programs.compute import COUNT

WINDOW_S = 0.25
QUIET_SHARE = 0.1
"""Of one core: so busy is a machine on which nothing is done."""
QUIET_WINDOWS = 2
COMPUTING_FOR_EACH_CORE = 2
_IDLE = (3, 4)
_STEAL = 7
"""From here on: what the host did instead of us, and what is already counted."""


def busy_s() -> float:
    """Processor time of all that the machine has done, in seconds: programs, servers, endpoint, kernel."""
    ticks = list(map(int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:]))
    counted = sum(value for place, value in enumerate(ticks[:_STEAL]) if place not in _IDLE)
    return counted / os.sysconf("SC_CLK_TCK")


def wait_quiet(limit_s: float) -> None:
    """Return once nothing is done on the machine any more, or after so many seconds."""
    deadline, quiet = time.monotonic() + limit_s, 0
    while quiet < QUIET_WINDOWS and time.monotonic() < deadline:
        before = busy_s()
        time.sleep(WINDOW_S)
        quiet = quiet + 1 if busy_s() - before < QUIET_SHARE * WINDOW_S else 0


class Computing:
    """Programs that compute; they begin when they are told."""

    def __init__(self, children: list[Child], counts: mmap.mmap) -> None:
        self._children = children
        self._counts = counts

    @property
    def pids(self) -> list[int]:
        """Their numbers."""
        return [child.pid for child in self._children]

    def begin(self) -> None:
        """Have them compute from now on."""
        for child in self._children:
            child.tell()

    @property
    def units(self) -> int:
        """How much work they have done so far."""
        return sum(struct.unpack_from(COUNT, self._counts, place * struct.calcsize(COUNT))[0] for place in self._places)

    @property
    def cpu_s(self) -> float:
        """Their processor time so far."""
        return cpu_s(self.pids)

    @property
    def _places(self) -> range:
        return range(len(self._children))


@contextmanager
def computing(count: int) -> Iterator[Computing]:
    """So many programs that compute, until the context ends."""
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile())
        file.truncate(max(1, count) * struct.calcsize(COUNT))
        counts = stack.enter_context(mmap.mmap(file.fileno(), 0))
        children = [
            stack.enter_context(Child("models.programs.compute", file.name, str(place))) for place in range(count)
        ]
        for child in children:
            child.wait_ready()
        yield Computing(children, counts)
