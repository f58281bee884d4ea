"""Have PyTorch, and JAX where it is, take capsules of this process's memory; report what becomes of their owners."""

import argparse
import ctypes
import gc
import importlib.util
import math
import weakref
from typing import Any

from common import report, run

from tests.gpu.capsules import Lent, Owner

BUFFER = (ctypes.c_float * 64)(*range(64))
ADDRESS = -(-ctypes.addressof(BUFFER) // 64) * 64
FIRST = (ADDRESS - ctypes.addressof(BUFFER)) / 4


def taken(take: Any, read: Any) -> dict[str, Any]:
    """What a framework makes of a tensor, and whether it keeps its owner for as long as it should."""
    owner = Owner()
    gone = weakref.ref(owner)
    tensor = take(Lent(owner, ADDRESS, "float32", (2, 3)))
    del owner
    gc.collect()
    kept, content = gone() is not None, read(tensor)
    del tensor
    gc.collect()
    freed = gone() is None
    owner = Owner()
    gone = weakref.ref(owner)
    lent = [Lent(owner, ADDRESS, "float32", (2, 3))]
    del owner
    try:
        math.sqrt(take(lent.pop()).reshape)
    except TypeError as error:  # and not SystemError, of an exception that was lost
        message = str(error).partition(",")[0]
    gc.collect()
    freed = freed and gone() is None
    right = content == [[FIRST, FIRST + 1, FIRST + 2], [FIRST + 3, FIRST + 4, FIRST + 5]]
    return {"right": right, "kept": kept, "freed": freed, "in an exception": message}


def main() -> None:
    """Try every framework that is installed."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    found = {}
    if importlib.util.find_spec("torch"):
        import torch

        found["torch"] = taken(torch.from_dlpack, lambda tensor: tensor.tolist())
    if importlib.util.find_spec("jax"):
        import jax.dlpack

        found["jax"] = taken(jax.dlpack.from_dlpack, lambda array: array.tolist())
    report({"frameworks": found})


if __name__ == "__main__":
    run(main)
