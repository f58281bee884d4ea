"""Writes bytes of files into the page cache, quickly whether there is free memory at hand or not.

A virtual machine may have given its free memory back to its host, which returns it page by page, at a tenth of the
speed of memory: first of all the large blocks that huge pages are made of. So the processor time of each write tells
how to go on: in huge pages while they cost nothing, else in small ones, which come from what was freed a moment ago.
Where those are slow as well, nothing is lost by huge pages; but ext4 and xfs write to a file one at a time, and two
threads that got their memory within a write would wait for each other. So they get it before, as pages of the hole.
"""

import contextlib
import enum
import mmap
import os
import time

from trimsfs.tiers.host.page_cache import populate

HUGE = 2 << 20
"""Bytes in one write that ext4 and xfs cache in one huge page: mapping it costs next to nothing."""
SMALL = 256 << 10
SLOW_RATE = 1e9
"""Bytes a second of processor time that writes exceed several times over when memory is at hand."""
SPAN = 16 << 20
"""Bytes after which another mode is tried again."""


class Mode(enum.Enum):
    """Where the memory of pages comes from."""

    HUGE = enum.auto()
    SMALL = enum.auto()
    POPULATED = enum.auto()
    """Pages are brought into the page cache before they are written."""


class PageWriter:
    """Writes pieces of up to HUGE bytes, for all threads of a process. They share what they have found out."""

    def __init__(self) -> None:
        self.mode = Mode.HUGE
        self._written = self._judged_bytes = 0
        self._judged_s = 0.0

    @property
    def size(self) -> int:
        """The bytes that should be written at a time."""
        return SMALL if self.mode is Mode.SMALL else HUGE

    def write(self, descriptor: int, part: memoryview, position: int) -> None:
        """Write all of *part*. Raises OSError."""
        mode, began = self.mode, time.thread_time()
        if mode is Mode.POPULATED:
            with contextlib.suppress(OSError):  # of a disk that fails, the write tells
                populate(descriptor, position - position % mmap.PAGESIZE, position + len(part))
        done = 0
        while done < len(part):
            done += os.pwrite(descriptor, part[done:], position + done)
        if len(part) >= SMALL:  # a call's own cost would tell nothing of memory
            self._learn(mode, len(part), time.thread_time() - began)

    def _learn(self, mode: Mode, size: int, cpu_s: float) -> None:
        if mode is not self.mode:
            return  # another thread has found out
        self._written += size
        self._judged_bytes += size
        self._judged_s += cpu_s
        if self._judged_bytes < HUGE:
            return
        slow = self._judged_bytes < self._judged_s * SLOW_RATE
        self._judged_bytes, self._judged_s = 0, 0.0
        over = self._written >= SPAN
        if mode is Mode.HUGE:
            self._go_on(Mode.SMALL if slow else mode)
        elif mode is Mode.SMALL:
            self._go_on(Mode.POPULATED if slow else Mode.HUGE if over else mode)
        else:
            self._go_on(Mode.HUGE if not slow else Mode.SMALL if over else mode)

    def _go_on(self, mode: Mode) -> None:
        if mode is not self.mode:
            self.mode, self._written = mode, 0
