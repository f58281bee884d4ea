"""Folding in MXNet programs: oneDNN rewrites weights in a layout of its own, and a thread folds them.

MXNet's engine tracks the readers and writers of each array, and schedules operators accordingly. The thread pushes each
folding step as an operator that writes to the array there, so that only users of this array wait.
"""

import _thread
import atexit
import ctypes
import functools
import logging
import mmap
import os
import sys
import threading
import time
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mxnet.base import _LIB, check_call

from trimsfs.client import native, pages
from trimsfs.client.native import Step
from trimsfs.client.pages import Region
from trimsfs.extras.folding.folding import LEAST, Foldable
from trimsfs.extras.mxnet.arrays import Records, unmap_unused
from trimsfs.extras.mxnet.mapped_files import MappedFile

log = logging.getLogger(__name__)

WRITING = ("MXNDArraySyncCopyFromCPU", "MXNDArraySyncCopyFromNDArray")
"""Functions of MXNet that write to an array in the calling thread, outside of the engine."""
EXPOSING = ("MXNDArrayGetData", "MXNDArrayToDLPack")
"""Functions that expose an array's memory: the program may then write to it without the engine's knowledge."""
FIRST_S, LAST_S, GROWTH = 1.0, 5.0, 1.2
"""Seconds between two checks of the mappings: after a change, at most, and the growth factor. The next check or load
frees a model that the program has dropped."""
MOST_SKIPPED = 64
PATIENCE_S = 30.0
"""How long the thread waits until the engine has executed a step."""
END_S = 2.0
"""How long the end of a program waits for a running check."""
NAIVE = "NaiveEngine"
"""An engine that executes everything in the calling thread, and so cannot keep steps apart from writers."""


class _Context(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


_CPU = _Context(1, 0)


@dataclass(slots=True, eq=False)
class _Watched:
    """A mapping while it lives, and the arrays in it; None for arrays that the program has dropped.

    ``regions`` are the addresses of the arrays, in order, and their numbers, from the first check on. ``seen`` is the
    number of private bytes at the last check, and ``checksum`` that of the bytes that would have been uploaded.
    ``tries`` counts folds that shared nothing, because another process uploads or the bytes change, as in training.
    After each, more checks are ``skipped``.
    """

    file: MappedFile
    mapping: "weakref.ref[mmap.mmap]"
    records: Records
    arrays: list[Any]
    regions: list[tuple[int, int, int]] = field(default_factory=list)
    seen: int = -1
    tries: int = 0
    checksum: int | None = None
    skipped: int = 0

    def sort(self) -> None:
        """Find the regions, at the first check, so that the load need not wait for it."""
        if not self.regions and self.arrays:
            _ = self.file.parts  # computed before folding changes the mappings
            begins, sizes = (self.records[field].tolist() for field in ("data", "nbytes"))
            regions = zip(begins, sizes, range(len(begins)), strict=True)
            self.regions = sorted((begin, begin + size, number) for begin, size, number in regions)

    def drop(self) -> bool:
        """Drop the arrays that only this object refers to; returns whether any is left."""
        for number in range(len(self.arrays)):
            if sys.getrefcount(self.arrays[number]) == 2:  # the list and the argument
                self.arrays[number] = None
        return any(array is not None for array in self.arrays)

    def settled(self, regions: Sequence[Region]) -> bool:
        """Whether the bytes are the same as at the last call; weights in training change."""
        checksum = 0
        for start, end in regions:
            checksum = zlib.crc32(pages.view(start, end), checksum)
        before, self.checksum = self.checksum, checksum
        return checksum == before


@dataclass(slots=True, eq=False)
class Folder:
    """Folds the mappings that it watches, and unmaps those that the program has dropped, while there are mappings.

    No method waits for a lock, because a finalizer may load a model in the middle of any method.
    """

    _watched: list[_Watched] = field(default_factory=list)
    _active: Any = field(default_factory=threading.Lock)  # held by the thread while it does not sleep
    _pending: list[tuple[Step, Any]] = field(default_factory=list)
    _running: bool = False
    _folding: bool = False
    _wait_s: float = FIRST_S

    def __post_init__(self) -> None:
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self._end)

    def install(self) -> None:
        """Enable folding, and wrap the functions that write to arrays outside of the engine."""
        self._folding = os.environ.get("MXNET_ENGINE_TYPE") != NAIVE
        if self._folding:
            for name in WRITING:
                setattr(_LIB, name, native.writing(getattr(_LIB, name)))
            for name in EXPOSING:
                setattr(_LIB, name, self._wrap_exposing(getattr(_LIB, name)))

    def watch(self, file: MappedFile, mapping: mmap.mmap, records: Records, arrays: Sequence[Any]) -> None:
        """Fold a mapping once the process has rewritten it; *arrays* are those of *records*."""
        if self._folding:
            self._drop()
            self._watched.append(_Watched(file, weakref.ref(mapping), records, list(arrays)))
            self._wait_s = FIRST_S
        self.start()

    def start(self) -> None:
        """Start the thread unless it runs; it ends when nothing is mapped. If two start at once, they take turns."""
        if not self._running:
            self._running = True
            try:
                _thread.start_new_thread(self._run, ())  # does not wait for the thread to begin, unlike threading
            except RuntimeError as error:  # the next load tries again
                log.info("models are neither folded nor unmapped: no thread can be started: %s", error)
                self._running = False

    def _wrap_exposing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def call(*arguments: Any) -> Any:
            self._stop()
            return function(*arguments)

        return call

    def _forked(self) -> None:
        """Continue in a forked child, which has no such thread."""
        self._active = threading.Lock()
        self._running = False
        self._pending.clear()
        if unmap_unused():
            self.start()

    def _stop(self) -> None:
        """Stop folding for good. A step under way ends first; pushed steps do nothing."""
        if self._folding:
            self._folding = False
            native.library().trimsfs_stop()

    def _end(self) -> None:
        """At the interpreter's end, keep the thread from calling MXNet."""
        self._stop()
        self._active.acquire(timeout=END_S)

    def _run(self) -> None:
        while True:
            time.sleep(self._wait_s)
            with self._active:
                self._check_all()
            self._running = False
            if not self._watched and not unmap_unused():  # a later load starts a new thread
                return
            self._running = True

    def _check_all(self) -> None:
        if not self._folding:
            self._watched.clear()
        self._drop()
        self._pending[:] = [other for other in self._pending if other[0].shared is None]
        unmap_unused()
        try:
            watched = list(self._watched)
            for each in watched:
                each.sort()
            changed = [self._check(each) for each in watched]
            self._wait_s = FIRST_S if any(changed) else min(LAST_S, self._wait_s * GROWTH)
        except Exception as error:  # a failed check must not stop the program
            log.info("folding ends in this process: %r", error)
            self._stop()

    def _drop(self) -> None:
        """Forget mappings whose arrays the program has dropped."""
        for each in list(self._watched):
            if not each.drop():
                with suppress(ValueError):  # another thread was first
                    self._watched.remove(each)

    def _check(self, watched: _Watched) -> bool:
        """Fold a mapping unless it has new private pages since the last check; returns whether anything changed."""
        mapping = watched.mapping()
        if mapping is None:
            return False
        if watched.skipped:
            watched.skipped -= 1
            return False
        regions = [(start, end) for start, end, _ in watched.regions]
        foldable = Foldable(watched.file.path, watched.file.status.st_ino, mapping, regions)
        own = foldable.own()
        if own != watched.seen:
            watched.seen, watched.tries = own, 0
            return True
        if own < LEAST:
            return False
        folded = foldable.fold(functools.partial(self._execute, watched), watched.settled)
        log.info("%s: %s", watched.file.path, folded)
        watched.seen, watched.tries = folded.own, 0 if folded.shared else watched.tries + 1
        watched.skipped = min((1 << watched.tries) >> 2, MOST_SKIPPED)
        return True

    def _execute(self, watched: _Watched, step: Step) -> None:
        """Push a step to the engine, behind all operators that use the array there, and wait for its execution.

        A step lies in one array: pushing an operator on several is not atomic, and two threads could deadlock.
        """
        _, _, number = watched.regions[bisect_right(watched.regions, (step.start, sys.maxsize)) - 1]
        array = watched.arrays[number]
        if not self._folding or array is None:
            native.library().trimsfs_release(step.pointer)  # in place of the engine
            return
        execute, release = native.engine_functions()
        self._pending.append((step, array))  # keeps memory and array until the engine has executed it
        check_call(
            _LIB.MXEnginePushSyncND(
                *(execute, step.pointer, release, ctypes.byref(_CPU)),
                *(None, 0, ctypes.byref(array.handle), 1),
                *(None, 0, b"trimsfs_fold"),
            )
        )
        deadline = time.monotonic() + PATIENCE_S
        while step.shared is None and time.monotonic() < deadline and self._folding:
            time.sleep(0.001)


folder = Folder()
"""The folder of this process."""
