"""Have frameworks take tensors that are lent as those in a device's memory are, but lie in the memory of the host.

So frameworks without a GPU can be tried: reports which types each takes, and whether it keeps what it was given.
"""

import argparse
import ctypes
import gc
import importlib.util
import math
import time
import weakref
from collections.abc import Callable
from typing import Any

from common import report, run

from trimsfs.extras.gpu.client import DeviceTensor, frameworks
from trimsfs.formats import DTYPE_BITS, Tensor

SIZE = 64
ALIGNMENT = 64
"""Bytes; JAX copies on a CPU what lies elsewhere."""
WAIT_S = 10


class HostCopy:
    """In the place of a copy in a device's memory."""

    ordinal = 0
    read_only = True

    def __init__(self) -> None:
        self._buffer = (ctypes.c_uint8 * (SIZE + ALIGNMENT))()
        self.address = -(-ctypes.addressof(self._buffer) // ALIGNMENT) * ALIGNMENT
        ctypes.memmove(self.address, bytes(number % 2 for number in range(SIZE)), SIZE)


class HostTensor(DeviceTensor):
    """A tensor there."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def lent(copy: HostCopy, dtype: str) -> HostTensor:
    """A tensor of two rows; one that is none of elements has four bytes."""
    nbytes = DTYPE_BITS.get(dtype, 8) * 4 // 8
    tensor = Tensor("name", dtype, (2, 2), 0, nbytes)
    return HostTensor(tensor, copy)  # type: ignore[arg-type]


def told(take: Callable[[DeviceTensor], Any], dtype: str) -> str:
    """What a framework says of the tensor that it makes, or that it makes none."""
    try:
        made = take(lent(HostCopy(), dtype))
    except Exception as error:
        return type(error).__name__
    name = getattr(made.dtype, "__name__", str(made.dtype)).removeprefix("torch.")
    return f"{name} {list(made.shape)}"


def gone(owner: "weakref.ref[HostCopy]") -> bool:
    """Whether nothing keeps it any more; some frameworks let go in threads of their own."""
    end = time.monotonic() + WAIT_S
    while owner() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return owner() is None


def lives(take: Callable[[DeviceTensor], Any], content: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """Whether a framework has what was lent, where it is, for as long as it should."""
    copy = HostCopy()
    owner = weakref.ref(copy)
    made = take(lent(copy, "uint8"))
    ctypes.memmove(copy.address, b"\1\2\3\4", 4)
    del copy
    gc.collect()
    kept, shared = owner() is not None, content(made) == [[1, 2], [3, 4]]
    del made
    freed = gone(owner)
    copy = HostCopy()
    owner = weakref.ref(copy)
    tensors = [lent(copy, "uint8")]
    del copy
    try:
        math.sqrt(take(tensors.pop()).reshape)
    except TypeError as error:  # and not SystemError, of an exception that was lost
        message = str(error).partition(",")[0]
    return {"kept": kept, "shared": shared, "freed": freed and gone(owner), "exception": message}


def main() -> None:
    """Try every framework that is installed."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    contents: dict[str, Callable[[Any], list[Any]]] = {
        "torch": lambda tensor: tensor.tolist(),
        "jax": lambda array: array.tolist(),
        "mxnet": lambda array: array.asnumpy().tolist(),
    }
    found = {}
    for name, content in contents.items():
        if importlib.util.find_spec(name):
            take = getattr(frameworks, name)
            types = {dtype: told(take, dtype) for dtype in [*DTYPE_BITS, "q4_0"]}
            found[name] = {"types": types, **lives(take, content)}
    report({"frameworks": found})


if __name__ == "__main__":
    run(main)
