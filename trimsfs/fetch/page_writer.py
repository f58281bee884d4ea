"""Writes fetched bytes into the page cache in huge pages while these are cheap, else in small ones.

A virtual machine gives large blocks of free memory back to its host. The host returns them page by page, at a tenth of
the speed of memory; small pages come from memory that the machine has kept. Huge pages are quicker to map, but not
worth waiting for, so the writer measures the processor time of each huge write.

The kernel lets one thread at a time write to a file while the others spin. So the threads of a process take turns.
"""

import os
import threading
import time

HUGE = 2 << 20
"""Bytes in one write that ext4 and xfs cache in one huge page."""
SMALL = 256 << 10
SLOW_RATE = 1e9
"""Bytes a second of processor time below which huge pages are slow; writes with free memory are several times faster.
"""
SPAN = 256 << 20
"""Bytes to write in small pages before huge ones are tried again."""


class PageWriter:
    """Writes for all threads of a process. ``size`` is the number of bytes that callers should write at a time."""

    def __init__(self) -> None:
        self.size = HUGE
        self._left = 0
        self._turn = threading.Lock()

    def write(self, descriptor: int, part: memoryview, position: int) -> None:
        """Write all of *part*. Raises OSError."""
        with self._turn:
            self._write(descriptor, part, position)

    def _write(self, descriptor: int, part: memoryview, position: int) -> None:
        began = time.thread_time()
        done = 0
        while done < len(part):
            done += os.pwrite(descriptor, part[done:], position + done)
        if self.size == SMALL:
            self._left -= len(part)
            if self._left <= 0:
                self.size = HUGE
        elif len(part) == HUGE and (time.thread_time() - began) * SLOW_RATE > HUGE:
            self.size, self._left = SMALL, SPAN
