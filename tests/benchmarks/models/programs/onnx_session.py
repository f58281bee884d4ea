"""Open an ONNX model whose weights lie beside it, and run it once."""

import os
from collections.abc import Callable

import numpy as np
import onnxruntime

from tests.benchmarks.models.programs.common import serve


def load(path: str) -> Callable[[], bytes]:
    """The model of a directory."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # it reads no variable by itself
    session = onnxruntime.InferenceSession(f"{path}/model.onnx", options, providers=["CPUExecutionProvider"])
    (first,) = session.get_inputs()
    rows = np.random.default_rng(0).standard_normal(first.shape, dtype=np.float32)
    return lambda: bytes(session.run(None, {first.name: rows})[0])


if __name__ == "__main__":
    serve(load)
