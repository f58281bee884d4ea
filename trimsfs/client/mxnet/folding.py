"""Folding under MXNet, whose oneDNN writes weights in a layout of its own: a thread sees to it.

MXNet's engine knows who reads and writes which array, and executes what it is given in turn. So it is given the steps
of folding too, as operators that write to the arrays there; all else goes on.
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
from trimsfs.client.folding import LEAST, Foldable
from trimsfs.client.mxnet.arrays import Records, give_back
from trimsfs.client.mxnet.mapped_files import MappedFile
from trimsfs.client.native import Step
from trimsfs.client.pages import Region

log = logging.getLogger(__name__)

WRITING = ("MXNDArraySyncCopyFromCPU", "MXNDArraySyncCopyFromNDArray")
"""Functions of MXNet that write to an array in the calling thread, once the engine is done with it."""
LENDING = ("MXNDArrayGetData", "MXNDArrayToDLPack")
"""Those that tell where an array's memory is, so that others can write to it behind the engine's back."""
FIRST_S, LAST_S, GROWTH = 1.0, 5.0, 1.2
"""Seconds between two looks at the mappings, soon after a change and when nothing has changed for long. A model that
the program has dropped is freed at the next look, or when the next model is loaded."""
MOST_REST = 64
PATIENCE_S = 30.0
"""How long a step waits for what the engine has to execute before it."""
END_S = 2.0
"""How long a program that ends waits for a look that is under way."""
NAIVE = "NaiveEngine"
"""It executes everything in the calling thread, side by side with what others call."""


class _Context(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int), ("number", ctypes.c_int))


_CPU = _Context(1, 0)


@dataclass(slots=True, eq=False)
class _Watched:
    """A mapping, as far as it lives, and the arrays in it, None of those that nobody has any more.

    ``regions`` are where the arrays are, in order, and their numbers,
    from the first look on. ``seen`` is how many bytes of the mapping were the process's own at the last look,
    ``checksum`` that of what would have been passed on, and ``tries`` how often nothing has come of folding these:
    another process was at it, or they change, as in training. It is tried ever less often: ``rest`` is how many looks
    are left out next.
    """

    source: MappedFile
    mapping: "weakref.ref[mmap.mmap]"
    records: Records
    arrays: list[Any]
    regions: list[tuple[int, int, int]] = field(default_factory=list)
    seen: int = -1
    tries: int = 0
    checksum: int | None = None
    rest: int = 0

    def sort(self) -> None:
        """What is left for when nobody waits for the model any more. A process forked meanwhile does it all again."""
        if not self.regions and self.arrays:
            _ = self.source.parts  # asked for before anything is folded
            begins, sizes = (self.records[field].tolist() for field in ("data", "nbytes"))
            regions = zip(begins, sizes, range(len(begins)), strict=True)
            self.regions = sorted((begin, begin + size, number) for begin, size, number in regions)

    def drop(self) -> bool:
        """Drop arrays that nobody else has; whether any is left."""
        for number in range(len(self.arrays)):
            if sys.getrefcount(self.arrays[number]) == 2:  # the list and the argument
                self.arrays[number] = None
        return any(array is not None for array in self.arrays)

    def settled(self, regions: Sequence[Region]) -> bool:
        """Whether the bytes there are what they were when it was last asked: weights in training are not."""
        checksum = 0
        for start, end in regions:
            checksum = zlib.crc32(pages.view(start, end), checksum)
        before, self.checksum = self.checksum, checksum
        return checksum == before


@dataclass(slots=True, eq=False)
class Folder:
    """Folds the mappings it is told of, and unmaps what nobody uses any more, for as long as there are any.

    Threads wait for each other nowhere: finalizers may load models, whatever they run in the middle of.
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
        """Begin, and keep what writes to arrays past the engine apart from folding."""
        self._folding = os.environ.get("MXNET_ENGINE_TYPE") != NAIVE
        if self._folding:
            for name in WRITING:
                setattr(_LIB, name, native.writing(getattr(_LIB, name)))
            for name in LENDING:
                setattr(_LIB, name, self._lending(getattr(_LIB, name)))

    def watch(self, source: MappedFile, mapping: mmap.mmap, records: Records, arrays: Sequence[Any]) -> None:
        """Fold a mapping of a file once the process has rewritten it; the arrays are those of the records."""
        if self._folding:
            self._drop()
            self._watched.append(_Watched(source, weakref.ref(mapping), records, list(arrays)))
            self._wait_s = FIRST_S
        self.start()

    def start(self) -> None:
        """Have the thread, until nothing is mapped any more. Were two started at once, they would take turns."""
        if not self._running:
            self._running = True
            try:
                _thread.start_new_thread(self._run, ())  # returns at once, unlike that of threading
            except RuntimeError as error:  # the next model may have more luck
                log.info("no thread to fold and unmap: %s", error)
                self._running = False

    def _lending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def call(*arguments: Any) -> Any:
            self._stop()
            return function(*arguments)

        return call

    def _forked(self) -> None:
        """This is a child process, without the thread."""
        self._active = threading.Lock()
        self._running = False
        self._pending.clear()
        if give_back():
            self.start()

    def _stop(self) -> None:
        """Fold no more. A step that is under way ends first, those that wait for their turn do nothing."""
        if self._folding:
            self._folding = False
            native.library().trimsfs_stop()

    def _end(self) -> None:
        """The program ends, and with it MXNet: the thread is to call nothing of its any more."""
        self._stop()
        self._active.acquire(timeout=END_S)

    def _run(self) -> None:
        while True:
            time.sleep(self._wait_s)
            with self._active:
                self._look_at_all()
            self._running = False
            if not self._watched and not give_back():  # what comes from now on finds that there is no thread
                return
            self._running = True

    def _look_at_all(self) -> None:
        if not self._folding:
            self._watched.clear()
        self._drop()
        self._pending[:] = [other for other in self._pending if other[0].shared is None]
        give_back()
        try:
            watched = list(self._watched)
            for each in watched:
                each.sort()
            changed = [self._look(each) for each in watched]
            self._wait_s = FIRST_S if any(changed) else min(LAST_S, self._wait_s * GROWTH)
        except Exception as error:  # the program is to go on as it would without us
            log.info("weights are not shared any more once they have been rewritten: %r", error)
            self._stop()

    def _drop(self) -> None:
        """Free what nobody else has any more."""
        for each in list(self._watched):
            if not each.drop():
                with suppress(ValueError):  # another thread was first
                    self._watched.remove(each)

    def _look(self, watched: _Watched) -> bool:
        """Fold a mapping if nothing was written to new pages since the last look; whether there is more to come."""
        mapping = watched.mapping()
        if mapping is None:
            return False
        if watched.rest:
            watched.rest -= 1
            return False
        regions = [(start, end) for start, end, _ in watched.regions]
        foldable = Foldable(watched.source.path, watched.source.status.st_ino, mapping, regions)
        own = foldable.own()
        if own != watched.seen:
            watched.seen, watched.tries = own, 0
            return True
        if own < LEAST:
            return False
        folded = foldable.fold(functools.partial(self._execute, watched), watched.settled)
        log.info("%s: %s", watched.source.path, folded)
        watched.seen, watched.tries = folded.own, 0 if folded.shared else watched.tries + 1
        watched.rest = min((1 << watched.tries) >> 2, MOST_REST)
        return True

    def _execute(self, watched: _Watched, step: Step) -> None:
        """Have the engine execute a step when all else that uses the array there has been; wait until it has.

        The engine does not take an operator on several arrays in one go: two threads that push such operators can each
        wait for the other.
        """
        _, _, number = watched.regions[bisect_right(watched.regions, (step.start, sys.maxsize)) - 1]
        array = watched.arrays[number]
        if not self._folding or array is None:
            native.library().trimsfs_release(step.pointer)  # nobody will execute it
            return
        execute, release = native.engine_functions()
        self._pending.append((step, array))  # memory and array stay until it is executed, however long that takes
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
"""This process's."""
