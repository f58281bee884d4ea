"""Load a perceptron by path in one of many ways, compute with it, and report how much of it is shared.

What a way needs beside the weights is there before anything is measured: a small model goes the same way first.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Read when libraries are loaded. One thread makes outputs comparable, and threads have memory of their own.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
import numpy as np
from common import all_kib, digest, mapped_kib, report, run, seeded_array

import trimsfs

WEIGHTS_BYTES = 6 * 2048 * 2048 * 4

Array = np.ndarray[Any, Any]
Network = Callable[[Array], Array]


def _through(data: Any, weights: Mapping[str, Any], multiply: Callable[..., Any], relu: Callable[..., Any]) -> Any:
    for name in sorted(weights):
        data = relu(multiply(data, weights[name]))
    return data


def _numpy(weights: Mapping[str, Array]) -> Network:
    return lambda data: np.asarray(_through(data, weights, np.matmul, lambda array: np.maximum(array, 0)))


def _torch(weights: Mapping[str, Any]) -> Network:
    import torch

    return lambda data: np.asarray(_through(torch.from_numpy(data), weights, torch.matmul, torch.relu))


def _jax(weights: Mapping[str, Any]) -> Network:
    import jax

    return lambda data: np.asarray(_through(jax.numpy.asarray(data), weights, jax.numpy.matmul, jax.nn.relu))


def _tensorflow(weights: Mapping[str, Any]) -> Network:
    import tensorflow as tf

    return lambda data: np.asarray(_through(tf.constant(data), weights, tf.matmul, tf.nn.relu))


def _mxnet(weights: Mapping[str, Any]) -> Network:
    import mxnet as mx

    return lambda data: np.asarray(_through(mx.nd.array(data), weights, mx.nd.dot, mx.nd.relu).asnumpy())


def torch_load(model: Path, *, mmap: bool = False) -> Network:
    """PyTorch's own."""
    import torch

    return _torch(torch.load(model / "model.pt", mmap=mmap, weights_only=True))


def safetensors_torch(model: Path) -> Network:
    """safetensors for PyTorch."""
    import safetensors.torch

    return _torch(safetensors.torch.load_file(model / "model.safetensors"))


def safetensors_numpy(model: Path) -> Network:
    """safetensors for NumPy, one by one."""
    import safetensors

    with safetensors.safe_open(model / "model.safetensors", framework="np") as file:
        return _numpy({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping


def safetensors_flax(model: Path) -> Network:
    """safetensors for JAX."""
    import safetensors.flax

    return _jax(safetensors.flax.load_file(model / "aligned.safetensors"))


def numpy_load(model: Path, *, mmap_mode: Any = None) -> Network:
    """NumPy's own."""
    stacked = np.load(model / "weights.npy", mmap_mode=mmap_mode)
    return _numpy({str(layer): array for layer, array in enumerate(stacked)})


def onnxruntime(model: Path, name: str, **settings: str) -> Network:
    """ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = ort.InferenceSession(model / name, options, providers=["CPUExecutionProvider"])
    return lambda data: np.asarray(session.run(None, {"x0": data})[0])


def tensorflow_constant(model: Path) -> Network:
    """NumPy's arrays, as TensorFlow takes them."""
    import tensorflow as tf

    arrays = trimsfs.open(model / "aligned.safetensors").numpy()
    return _tensorflow({name: tf.constant(array) for name, array in arrays.items()})


WAYS: Mapping[str, Callable[[Path], Network]] = {
    "torch": torch_load,
    "torch mmap": lambda model: torch_load(model, mmap=True),
    "safetensors torch": safetensors_torch,
    "safetensors numpy": safetensors_numpy,
    "safetensors flax": safetensors_flax,
    "numpy": numpy_load,
    "numpy mmap": lambda model: numpy_load(model, mmap_mode="r"),
    "onnxruntime inside": lambda model: onnxruntime(model, "inside.onnx"),
    "onnxruntime beside": lambda model: onnxruntime(model, "beside.onnx"),
    "onnxruntime not packed": lambda model: onnxruntime(model, "beside.onnx", disable_prepacking="1"),
    "tensorflow constant": tensorflow_constant,
    "client numpy": lambda model: _numpy(trimsfs.open(model / "model.safetensors").numpy()),
    "client torch": lambda model: _torch(trimsfs.open(model / "model.safetensors").torch()),
    "client jax": lambda model: _jax(trimsfs.open(model / "aligned.safetensors").jax()),
    "client jax unaligned": lambda model: _jax(trimsfs.open(model / "model.safetensors").jax()),
    "client tensorflow": lambda model: _tensorflow(trimsfs.open(model / "aligned.safetensors").tensorflow()),
    "client tensorflow unaligned": lambda model: _tensorflow(trimsfs.open(model / "model.safetensors").tensorflow()),
    "client mxnet": lambda model: _mxnet(trimsfs.open(model / "model.safetensors").mxnet()),
}


def _compute(network: Network) -> None:
    output = network(seeded_array((1, 2048)))
    report({"output_sha256": digest([output.data]), "spread": float(output.std())})


def _await_line() -> None:
    if not sys.stdin.readline():
        raise RuntimeError("standard input was closed before a line came")


def main() -> None:
    """Load and compute; compute again after a line of input, measure after another, end with the input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    load = WAYS[options.way]
    load(options.directory / "small")(seeded_array((1, 64)))
    before = all_kib("Anonymous")
    network = load(options.directory / "large")
    _compute(network)
    _await_line()
    _compute(network)  # a host that takes back what is idle has unmapped pages meanwhile
    _await_line()
    # Dirty: the blob's pages, when it is new.
    mapped = mapped_kib(options.directory, "Shared_Clean", "Shared_Dirty", "Pss")
    shared = mapped["Shared_Clean"] + mapped["Shared_Dirty"]
    parts = {"copied": all_kib("Anonymous") - before, "shared": shared, "pss": mapped["Pss"]}
    report({name: round(kib * 1024 / WEIGHTS_BYTES, 3) for name, kib in parts.items()})
    sys.stdin.read()


if __name__ == "__main__":
    run(main)
