"""Load a network in MXNet's own way and infer with it."""

from collections.abc import Callable

import mxnet as mx
import numpy as np

from tests.benchmarks.models.programs.common import serve

SHAPE = (1, 3, 224, 224)


def load(path: str) -> Callable[[], bytes]:
    """The network of a directory."""
    network = mx.gluon.SymbolBlock.imports(f"{path}/symbol.json", ["data"], f"{path}/params")
    mx.nd.waitall()
    image = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    return lambda: bytes(network(mx.nd.array(image)).asnumpy())


if __name__ == "__main__":
    serve(load)
