"""Build one model directory for PyTorch, safetensors, NumPy and ONNX Runtime."""

import argparse
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch
import torchvision
from common import build, run, seeded_array

LAYERS = 5
WIDTH = 1024


def write_torch(directory: Path) -> None:
    """Write the weights of one ResNet-18 as a torch file and as a safetensors file."""
    torch.manual_seed(0)
    weights = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(weights, directory / "model.pt")
    safetensors.torch.save_file(weights, directory / "model.safetensors")


def write_onnx(directory: Path) -> None:
    """Write a perceptron whose weights lie in an external data file."""
    nodes = []
    initializers = []
    for layer in range(LAYERS):
        # He's scale keeps the activations' size from layer to layer.
        weights = seeded_array((WIDTH, WIDTH), seed=layer) * np.float32((2 / WIDTH) ** 0.5)
        name = f"weights{layer}"
        initializers.append(onnx.numpy_helper.from_array(weights, name))
        nodes.append(onnx.helper.make_node("MatMul", [f"x{layer}", name], [f"y{layer}"]))
        nodes.append(onnx.helper.make_node("Relu", [f"y{layer}"], [f"x{layer + 1}"]))
    float32 = onnx.TensorProto.FLOAT
    first = onnx.helper.make_tensor_value_info("x0", float32, [1, WIDTH])
    last = onnx.helper.make_tensor_value_info(f"x{LAYERS}", float32, [1, WIDTH])
    graph = onnx.helper.make_graph(nodes, "perceptron", [first], [last], initializers)
    # Both versions are older than the newest, which a given ONNX Runtime may not know yet.
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save_model(
        model,
        directory / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
    )


def write_all(directory: Path) -> None:
    """Write every file of the model."""
    write_torch(directory)
    np.save(directory / "weights.npy", seeded_array((LAYERS, WIDTH, WIDTH)))
    write_onnx(directory)


def main() -> None:
    """Build the model in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    build(
        parser.parse_args().directory,
        ("model.onnx", "model.onnx.data", "model.pt", "model.safetensors", "weights.npy"),
        write_all,
    )


if __name__ == "__main__":
    run(main)
