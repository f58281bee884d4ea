"""Build an MXNet checkpoint: a network of the Gluon model zoo with seeded random weights."""

import argparse
import os
from pathlib import Path

from common import build, run, seeded_array

# OpenMP reads this once, when MXNet loads it.
os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx


def write_checkpoint(directory: Path, model: str) -> None:
    """Write the network's weights to `params` and its graph to `symbol.json`."""
    mx.random.seed(0)
    network = mx.gluon.model_zoo.vision.get_model(model, classes=1000)
    network.initialize(mx.init.Xavier())
    network.hybridize()
    # Shapes are inferred, and the graph is traced, by the first call.
    network(mx.nd.array(seeded_array((1, 3, 224, 224)))).wait_to_read()
    network.export(str(directory / "model"))
    (directory / "model-0000.params").rename(directory / "params")
    (directory / "model-symbol.json").rename(directory / "symbol.json")


def main() -> None:
    """Build the checkpoint in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="resnet50_v1", help="a name of the Gluon model zoo")
    arguments = parser.parse_args()
    build(
        arguments.directory,
        ("params", "symbol.json"),
        lambda directory: write_checkpoint(directory, arguments.model),
    )


if __name__ == "__main__":
    run(main)
