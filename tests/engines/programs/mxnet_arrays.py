"""MXNet: arrays of a ``.params`` file."""

from pathlib import Path

import mxnet as mx

from tests.engines.programs.common import WIDTH, floats, main, matrices


def build(directory: Path, divide: int) -> None:
    """Random weights."""
    weights = {f"layer{layer}": mx.nd.array(matrix) for layer, matrix in enumerate(matrices(divide))}
    mx.nd.save(str(directory / "network.params"), weights)


def load(directory: Path) -> tuple[object, bytes]:
    """The arrays, and their products."""
    weights = mx.nd.load(str(directory / "network.params"))
    data = mx.nd.ones((1, WIDTH))
    for name in sorted(weights):
        data = mx.nd.relu(mx.nd.dot(data, weights[name]))
    return weights, floats(data.asnumpy()[0, :64].tolist())


if __name__ == "__main__":
    main(build, {"nd-load": ("*.params", load)})
