"""Load an MXNet checkpoint by path, infer once, and measure a shared mapping of its weights."""

import argparse
import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
from common import digest, report, residency, run, seeded_array

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
        "parameters": len(network.collect_params().keys()),
        "params_bytes": params.stat().st_size,
    }


def map_and_touch(path: Path) -> mmap.mmap:
    """Map a whole file read-only and shared, and read a byte of every page."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE].max()
    return mapping


def main() -> None:
    """Load, infer, map and report; with --hold-on-stdin measure again after a line of input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--hold-on-stdin",
        action="store_true",
        help='report {"ready": true} when mapped, and wait for a line before the final report',
    )
    arguments = parser.parse_args()
    params = arguments.directory / "params"

    results = load_and_infer(params, arguments.directory / "symbol.json")
    arrays = len(mx.nd.load(str(params)))
    if arrays != results["parameters"]:
        raise RuntimeError(f"{arrays} arrays in {params}, {results['parameters']} in the network")

    mapping = map_and_touch(params)
    if arguments.hold_on_stdin:
        report({"ready": True, **residency(mapping)})
        if not sys.stdin.readline():
            raise RuntimeError("stdin was closed before a line came")
    report({**results, **residency(mapping)})


if __name__ == "__main__":
    run(main)
