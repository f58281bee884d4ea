"""Writes bytes of files into the page cache, quickly whether memory for huge pages is at hand or not.

A virtual machine gives large blocks of free memory back to its host, which returns them page by page, at a tenth of the
speed of memory. Small pages come from what the machine has kept. So the processor time of a write in huge pages tells
whether the next ones are worth trying: huge pages are quick to map, but nobody should wait for them.

The kernel lets one thread at a time write to a file, and has the others spin. So the threads of a process take turns.
"""

import os
import threading
import time

HUGE = 2 << 20
"""Bytes in one write that ext4 and xfs cache in one huge page."""
SMALL = 256 << 10
SLOW_RATE = 1e9
"""Bytes a second of processor time that a write exceeds several times over when memory is at hand."""
SPAN = 256 << 20
"""Bytes after which huge pages are tried again."""


class PageWriter:
    """Writes pieces, for all threads of a process, which share what they find out.

    ``size`` is how many bytes should be written at a time.
    """

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
