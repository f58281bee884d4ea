"""Folding under MXNet, whose oneDNN writes weights in a layout of its own: by a thread, while nothing executes.

Whatever can write to an array is pushed to MXNet's engine by one of a few functions of its C API. These go through a
gate, which is closed, and the engine waited for, while a part of a mapping is compared and mapped.
"""

import atexit
import contextlib
import functools
import logging
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mxnet
from mxnet.base import _LIB, MXNetError

from trimsfs.client.folding import LEAST, Foldable

log = logging.getLogger(__name__)

PUSHING = (
    "MXImperativeInvoke",
    "MXImperativeInvokeEx",
    "MXInvokeCachedOp",
    "MXInvokeCachedOpEx",
    "MXExecutorForward",
    "MXExecutorBackward",
    "MXExecutorBackwardEx",
    "MXAutogradBackward",
    "MXAutogradBackwardEx",
    "MXNDArraySyncCopyFromCPU",
    "MXNDArraySyncCopyFromNDArray",
    "MXKVStorePush",
    "MXKVStorePushEx",
    "MXKVStorePull",
    "MXKVStorePullEx",
    "MXKVStorePushPull",
    "MXKVStorePushPullEx",
)
FIRST_S, LAST_S, GROWTH = 1.0, 30.0, 1.2
"""Seconds between two looks at the mappings, soon after a load and when nothing has changed for long."""
MOST_TRIES = 5
"""Another process may be about to pass the same bytes on."""
CLOSING_S = 3.0
"""How long the gate waits for what is under way. Operators in Python would wait for the gate in their turn."""


class Gate:
    """Lets calls through from any thread, or one that folds alone."""

    def __init__(self) -> None:
        self._inside: set[int] = set()
        self._closed = False
        self._opened = threading.Event()

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls wait while the gate is closed."""

        @functools.wraps(function, updated=())
        def call(*arguments: Any) -> Any:
            thread = threading.get_ident()
            if thread in self._inside:  # a callback of a call that is inside
                return function(*arguments)
            self._inside.add(thread)
            while self._closed:
                self._inside.discard(thread)
                self._opened.wait()
                self._inside.add(thread)
            try:
                return function(*arguments)
            finally:
                self._inside.discard(thread)

        return call

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nothing executes in the block. Raises TimeoutError when what is under way does not end."""
        self._opened.clear()
        self._closed = True
        try:
            deadline = time.monotonic() + CLOSING_S
            while self._inside and time.monotonic() < deadline:
                time.sleep(0.0002)
            waiting = threading.Thread(target=_wait_for_all, daemon=True)
            waiting.start()
            waiting.join(deadline - time.monotonic())
            if self._inside or waiting.is_alive():
                raise TimeoutError("what MXNet executes does not end")
            yield
        finally:
            self.open()

    def open(self) -> None:
        self._closed = False
        self._opened.set()

    def forked(self) -> None:
        """This is a child process: no other thread is here."""
        self._inside.clear()
        self.open()


@dataclass(slots=True)
class _Watched:
    """A mapping, as far as it lives. ``seen`` is how many bytes of it were the process's own at the last look, and
    ``tries`` how often it has been tried to fold these."""

    path: Path
    inode: int
    mapping: "weakref.ref[mmap.mmap]"
    seen: int = -1
    tries: int = 0


class Folder:
    """Folds the mappings it is told of, for as long as the process runs."""

    def __init__(self) -> None:
        self._gate = Gate()
        self._watched: list[_Watched] = []
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def install(self) -> None:
        """Have what MXNet executes go through the gate; not that which does not come by its functions in C."""
        if "mxnet._cy3.ndarray" in sys.modules:
            self._stopping = True
            return
        for name in PUSHING:
            function = getattr(_LIB, name, None)
            if function is not None:
                setattr(_LIB, name, self._gate.guard(function))
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self._stop)

    def watch(self, path: Path, inode: int, mapping: mmap.mmap) -> None:
        """Fold a mapping once the process has rewritten it."""
        self._watched.append(_Watched(path, inode, weakref.ref(mapping)))
        self._wake.set()
        self._start()

    def _start(self) -> None:
        if self._thread is None and not self._stopping:
            self._thread = threading.Thread(target=self._run, name="trimsfs-fold", daemon=True)
            self._thread.start()

    def _forked(self) -> None:
        self._gate.forked()
        self._thread = None
        self._wake = threading.Event()
        if self._watched:
            self._start()

    def _stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSING_S)

    def _run(self) -> None:
        try:
            while self._watched and not self._stopping:
                self._wake.clear()
                wait_s = FIRST_S
                while self._watched and not self._wake.wait(wait_s):
                    changed = [self._look(watched) for watched in list(self._watched)]
                    wait_s = FIRST_S if any(changed) else min(LAST_S, wait_s * GROWTH)
            self._thread = None
        except Exception as error:  # the program is to go on as it would without us
            log.info("weights are not shared any more once they have been rewritten: %r", error)

    def _look(self, watched: _Watched) -> bool:
        """Fold a mapping whose pages are not being rewritten just now; whether they have been since the last look."""
        mapping = watched.mapping()
        if mapping is None:
            self._watched.remove(watched)
            return False
        foldable = Foldable(watched.path, watched.inode, mapping)
        own = foldable.own()
        if own != watched.seen:
            watched.seen, watched.tries = own, 0
            return True
        if own < LEAST or watched.tries == MOST_TRIES:
            return False
        watched.tries += 1
        folded = foldable.fold(self._gate.closed)
        log.info("%s: %s", watched.path, folded)
        watched.seen = folded.own
        return True


def _wait_for_all() -> None:
    with contextlib.suppress(MXNetError):  # whoever waits for that array hears of it
        mxnet.nd.waitall()
