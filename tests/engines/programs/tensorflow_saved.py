"""TensorFlow: a SavedModel."""

from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.engines.programs.common import floats, main

WIDTH, LAYERS = 2048, 6


def build(directory: Path, divide: int) -> None:
    """Random weights."""
    tf.random.set_seed(0)
    network = tf.Module()
    network.layers = [tf.Variable(tf.random.normal((WIDTH, WIDTH)) / 45) for _ in range(max(1, LAYERS // divide))]

    def call(data: Any) -> Any:
        for weight in network.layers:
            data = tf.nn.relu(data @ weight)
        return data

    network.call = tf.function(call, input_signature=[tf.TensorSpec((1, WIDTH), tf.float32)])
    tf.saved_model.save(network, str(directory))


def load(directory: Path) -> tuple[object, bytes]:
    """The model, and one call."""
    model = tf.saved_model.load(str(directory))
    return model, floats(model.call(tf.ones((1, WIDTH)))[0, :64].numpy().tolist())


if __name__ == "__main__":
    main(build, {"saved-model": ("**/*", load)})
