"""Write an ONNX model, a chain of matrices of random weights, with external data: ``onnx_build DIRECTORY BYTES``."""

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 2048


def main() -> None:
    """Build it and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("nbytes", type=int)
    options = parser.parse_args()
    options.directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "input"
    for number in range(max(1, options.nbytes // (4 * WIDTH * WIDTH))):
        matrix = random.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
        weights.append(numpy_helper.from_array(matrix, f"weight{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"weight{number}"], [f"row{number}"]))
        last = f"row{number}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("input", last)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = options.directory / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data")
    for written in options.directory.iterdir():
        written.chmod(0o644)  # onnx makes files that only their owner may read


if __name__ == "__main__":
    main()
