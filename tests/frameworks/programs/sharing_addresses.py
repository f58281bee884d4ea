"""Open model files as JAX arrays or TensorFlow tensors, and report what is in them and which share the file."""

import argparse
import gc
import os
import zlib
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_ENABLE_X64": "1"}
import numpy as np
from common import report, run

import trimsfs


def main() -> None:
    """Open every file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["jax", "tensorflow"])
    parser.add_argument("paths", type=Path, nargs="+")
    options = parser.parse_args()
    files = {}
    for path in options.paths:
        model = trimsfs.open(path)
        places = {name: array.ctypes.data for name, array in model.numpy().items() if array.nbytes}
        tensors = model.jax() if options.library == "jax" else model.tensorflow()
        del model  # tensors keep what they need
        gc.collect()
        facts, shared = {}, []
        for name, tensor in tensors.items():
            array = np.asarray(tensor)
            facts[name] = [array.dtype.name, list(array.shape), zlib.crc32(array.tobytes())]
            place = tensor.unsafe_buffer_pointer() if options.library == "jax" else array.ctypes.data
            if place == places.get(name):
                shared.append(name)
        files[path.name] = {"facts": facts, "shared": shared}
    report({"files": files})


if __name__ == "__main__":
    run(main)
