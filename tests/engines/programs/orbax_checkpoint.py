"""JAX: a checkpoint of Orbax."""

import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.engines.programs.common import WIDTH, floats, main, matrices


def build(directory: Path, divide: int) -> None:
    """Random weights."""
    weights = {f"layer{layer}": jax.numpy.asarray(matrix) for layer, matrix in enumerate(matrices(divide))}
    shutil.rmtree(directory)  # Orbax makes it
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), weights)


def load(directory: Path) -> tuple[object, bytes]:
    """The checkpoint, and one product."""
    with ocp.StandardCheckpointer() as checkpointer:
        weights = checkpointer.restore(directory)
    data = jax.numpy.ones((1, WIDTH))
    for name in sorted(weights):
        data = jax.nn.relu(data @ weights[name])
    return weights, floats(np.asarray(data)[0, :64].tolist())


if __name__ == "__main__":
    main(build, {"restore": ("**/*", load)})
