"""Write to an array in every way that MXNet has, while it is folded all the time, and count the writes that were lost.

Run under ``trimsfs run``. Derived blobs are local files here, so that there can be any number of folds; steps are
executed by the library named on the command line, which takes its time between comparing and mapping.
"""

import argparse
import ctypes
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from common import report, run

from trimsfs.client import native
from trimsfs.extras.folding import folding
from trimsfs.extras.mxnet import folding_thread

VALUES = 24
SHAPE = (1 << 20,)


def build(path: Path) -> None:
    """Save the array that is to be written to."""
    mx.nd.save(str(path), {"weights": mx.nd.zeros(SHAPE)})


def fold_all_the_time(library: str, scratch: Path) -> list[int]:
    """Have the thread that folds do so without end; what it counts folds in."""
    slow = ctypes.CDLL(library, use_errno=True)
    for name in ("step", "execute", "release", "shared"):
        function, model = getattr(slow, f"trimsfs_{name}"), getattr(native.library(), f"trimsfs_{name}")
        function.argtypes, function.restype = model.argtypes, model.restype
    replace(native, library=lambda: slow)
    for name in folding_thread.WRITING:  # kept apart by the library that was there before
        original = getattr(mx.base._LIB, name).__wrapped__
        setattr(mx.base._LIB, name, native.writing(original))
    counted, derived, fold = [0], scratch / "derived", folding.Foldable.fold

    def pass_on(self: Any, number: int, regions: Any) -> int:
        pieces = (bytes(piece) for piece in folding._pieces(self._start, regions, number))
        content = b"".join(piece[24 : 24 + int.from_bytes(piece[16:20], "little")] for piece in pieces)
        derived.with_suffix(".new").write_bytes(content)
        derived.with_suffix(".new").rename(derived)
        return len(content)

    def fold_anew(self: Any, execute: Any, settled: Any) -> folding.Folded:
        derived.unlink(missing_ok=True)
        folded = fold(self, execute)
        counted[0] += folded.shared > 0
        return folded

    replace(
        folding.Foldable,
        _derived=lambda _self, _path, number: derived if number == 0 else scratch / "none",
        _upload=pass_on,
        fold=fold_anew,
    )
    replace(folding_thread, FIRST_S=0.02, LAST_S=0.02, MOST_SKIPPED=0)
    return counted


def replace(owner: object, **named: object) -> None:
    """Put others in the place of what a module or class has."""
    for name, value in named.items():
        setattr(owner, name, value)


def ways(array: Any) -> Iterator[tuple[str, Callable[[int], None]]]:
    """The ways to give every element of an array a value."""
    store, values = mx.kv.create("local"), [mx.nd.full(SHAPE, value) for value in range(VALUES)]
    for value in range(VALUES):
        store.init(str(value), values[value])
    numpy_array = array.as_np_ndarray()

    def assign(value: int) -> None:
        array[:] = value

    def bulk(value: int) -> None:
        with mx.engine.bulk(8):
            array[:] = value
            time.sleep(random.random() / 10)
            array.wait_to_read()

    def numpy(value: int) -> None:
        numpy_array[:] = value

    yield "assign", assign
    yield "copy from NumPy", lambda value: array._sync_copyfrom(np.full(SHAPE, value, np.float32))
    yield "copy", lambda value: values[value].copyto(array)
    yield "pull", lambda value: store.pull(str(value), out=array)
    yield "bulk", bulk
    yield "NumPy's arrays", numpy
    yield "update", lambda value: mx.nd.sgd_update(array, array - value, lr=1.0, out=array)


def main() -> None:
    """Save the array, or write to it in each way for some seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--library")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    if options.build:
        build(options.path)
        return
    counted = fold_all_the_time(options.library, options.scratch)
    array = mx.nd.load(str(options.path))["weights"]
    told: dict[str, dict[str, int]] = {}
    random.seed(1)
    for name, write in ways(array):
        folds, writes, wrong, end = counted[0], 0, 0, time.monotonic() + options.seconds
        while time.monotonic() < end or counted[0] == folds:
            writes += 1
            write(writes % VALUES)
            time.sleep(random.random() / 4)
            wrong += not (array.asnumpy() == writes % VALUES).all()
            if writes > 100 * options.seconds:
                break
        told[name] = {"writes": writes, "folds": counted[0] - folds, "wrong": wrong}
    report(told)


if __name__ == "__main__":
    run(main)
