"""Load a written network in MXNet's own ways and infer with it: prints a line of JSON with what came out."""

import argparse
import json
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np

from .models import MODELS


def main() -> None:
    """Report on the network named on the command line."""
    parser = argparse.ArgumentParser(prog="zoo.infer", description=__doc__)
    parser.add_argument("name", choices=MODELS, metavar="NAME")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    options = parser.parse_args()
    params, symbol = str(options.directory / "params"), str(options.directory / "symbol.json")
    numbers = sum(array.size for array in mx.nd.load(params).values())
    network = mx.gluon.SymbolBlock.imports(symbol, ["data"], params)
    outputs = []
    for seed in (0, 1):
        image = np.random.default_rng(seed).standard_normal(MODELS[options.name].input_shape, dtype=np.float32)
        outputs.append(network(mx.nd.array(image)).asnumpy()[0])
    print(json.dumps({"numbers": numbers, **_described(*outputs)}))


def _described(output: Any, other: Any) -> dict[str, object]:
    """What the probabilities of one image are like, and how far they are from another's (0 to 1)."""
    return {
        "classes": output.size,
        "finite": bool(np.isfinite(output).all() and np.isfinite(other).all()),
        "sum": float(output.sum()),
        "least": float(output.min()),
        "most": float(output.max()),
        "changed": float(abs(output - other).sum() / 2),
    }


if __name__ == "__main__":
    main()
