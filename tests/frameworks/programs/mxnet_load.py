"""Load an MXNet checkpoint by path, infer once, and measure a shared mapping of its weights."""

import os
import time
from pathlib import Path

from common import digest, directory_argument, report_mapped, run, seeded_array

# OpenMP reads this once, when MXNet loads it. One thread makes outputs comparable.
os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx


def load_and_infer(params: Path, symbol: Path) -> dict[str, object]:
    """Load the network and run it on one seeded image."""
    start = time.perf_counter()
    network = mx.gluon.SymbolBlock.imports(str(symbol), ["data"], str(params))
    mx.nd.waitall()
    loaded = time.perf_counter()
    output = network(mx.nd.array(seeded_array((1, 3, 224, 224)))).asnumpy()
    inferred = time.perf_counter()
    return {
        "load_s": round(loaded - start, 4),
        "infer_s": round(inferred - loaded, 4),
        "output_sha256": digest([output.data]),
    }


def main() -> None:
    """Load, infer, map and report."""
    directory = directory_argument(__doc__)
    params = directory / "params"
    report_mapped(load_and_infer(params, directory / "symbol.json"), params)


if __name__ == "__main__":
    run(main)
