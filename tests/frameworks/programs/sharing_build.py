"""Write the weights of a perceptron in the format of every framework: a large one, and a small one to warm up with."""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import safetensors.numpy
import torch
from common import build, run, seeded_array

LAYERS = 6
WIDTHS = {"small": 64, "large": 2048}


def write_safetensors(path: Path, weights: dict[str, np.ndarray], remainder: int) -> None:
    """Write tensors whose addresses have a remainder, itself a multiple of 8, on division by 64."""
    padding = ""
    for _ in range(2):  # the first tells how long the header is
        safetensors.numpy.save_file(weights, path, metadata={"padding": padding})
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        padding = "x" * ((remainder - begin) % 64)
    if begin % 64 != remainder:
        raise RuntimeError(f"{path}: tensors begin at {begin}")


def onnx_of(weights: dict[str, np.ndarray], width: int) -> onnx.ModelProto:
    """The perceptron, its weights inside."""
    nodes = []
    for layer, name in enumerate(weights):
        nodes.append(onnx.helper.make_node("MatMul", [f"x{layer}", name], [f"y{layer}"]))
        nodes.append(onnx.helper.make_node("Relu", [f"y{layer}"], [f"x{layer + 1}"]))
    first, last = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, width]) for name in ("x0", f"x{LAYERS}")
    )
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "perceptron", [first], [last], initializers)
    # Both versions are older than the newest, which a given ONNX Runtime may not know yet.
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def write_all(directory: Path, width: int) -> None:
    """Write every file of a model."""
    # He's scale keeps the activations' size from layer to layer.
    stacked = seeded_array((LAYERS, width, width)) * np.float32((2 / width) ** 0.5)
    weights = {f"weights{layer}": array for layer, array in enumerate(stacked)}
    np.save(directory / "weights.npy", stacked)
    torch.save({name: torch.from_numpy(array.copy()) for name, array in weights.items()}, directory / "model.pt")
    write_safetensors(directory / "aligned.safetensors", weights, 0)
    write_safetensors(directory / "model.safetensors", weights, 24)
    model = onnx_of(weights, width)
    onnx.save_model(model, directory / "inside.onnx")
    external = {"save_as_external_data": True, "location": "beside.onnx.data", "size_threshold": 0}
    onnx.save_model(model, directory / "beside.onnx", **external)


def main() -> None:
    """Write both models below the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    names = ("weights.npy", "model.pt", "aligned.safetensors", "model.safetensors", "inside.onnx", "beside.onnx")
    for size, width in WIDTHS.items():
        build(directory / size, (*names, "beside.onnx.data"), partial(write_all, width=width))


if __name__ == "__main__":
    run(main)
