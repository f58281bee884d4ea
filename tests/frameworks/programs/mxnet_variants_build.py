"""Build a ResNet-50 of MXNet's model zoo, and fine-tuned variants of it."""

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
from common import build, run
from variants import VARIANTS, Array, variant_of

# OpenMP reads this once, when MXNet loads it.
os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx

PREFIX = "resnet_"


def weights_of(classes: int) -> dict[str, Array]:
    """Random weights, the same for the same arguments, with the names that an exported network has."""
    network = mx.gluon.model_zoo.vision.resnet50_v1(classes=classes, prefix=PREFIX)
    network.initialize()
    network(mx.nd.zeros((1, 3, 224, 224))).wait_to_read()  # shapes are inferred by the first call
    return {
        f"{'aux' if parameter.grad_req == 'null' else 'arg'}:{name}": np.random.default_rng(number)
        .standard_normal(parameter.shape)
        .astype(np.float32)
        for number, (name, parameter) in enumerate(network.collect_params().items())
    }


def write_variant(directory: Path, variant: str) -> None:
    """Write a variant."""
    head, block = [f"arg:{PREFIX}dense"], [f"{kind}:{PREFIX}stage4" for kind in ("arg", "aux")]
    arrays = variant_of(weights_of(1000), weights_of(10), variant, head=head, block=block)
    mx.nd.save(str(directory / "model.params"), {name: mx.nd.array(array) for name, array in arrays.items()})


def main() -> None:
    """Build all variants below the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    for variant in VARIANTS:
        build(directory / variant, ("model.params",), partial(write_variant, variant=variant))


if __name__ == "__main__":
    run(main)
