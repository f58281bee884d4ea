"""Load a variant of a model and use all of it; report how much memory its files take this process."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
from common import digest, mapped_kib, report, run, seeded_array

PAUSE_S, PATIENCE_S = 0.1, 8.0


def with_numpy(path: Path) -> str:
    """All tensors by the client, every byte read."""
    import trimsfs

    arrays = trimsfs.open(path).numpy()
    _kept.append(arrays)
    return digest(np.ascontiguousarray(array).data for array in arrays.values())


def with_mxnet(path: Path) -> str:
    """A ResNet-50 of the model zoo, at inference, until what MXNet has rewritten is folded."""
    import mxnet as mx

    network = mx.gluon.model_zoo.vision.resnet50_v1(classes=10 if "classes" in path.parts else 1000, prefix="resnet_")
    network.collect_params().load(str(path))
    network.hybridize()
    _kept.append(network)
    data = mx.nd.array(seeded_array((1, 3, 224, 224)))
    output = network(data).asnumpy()
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and mapped_kib(path.parents[1], "Private_Dirty")["Private_Dirty"] > 1024:
        network(data).wait_to_read()
        time.sleep(PAUSE_S)
    network(data).wait_to_read()  # what has been folded is used
    return digest([output.data])


_kept: list[object] = []
WAYS: Mapping[str, Callable[[Path], str]] = {"numpy": with_numpy, "mxnet": with_mxnet}


def main() -> None:
    """Load and use; measure after a line of input, end with the input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("path", type=Path, help="two directories below the mount's")
    options = parser.parse_args()
    start = time.perf_counter()
    output = WAYS[options.way](options.path)
    report({"output_sha256": output, "load_s": round(time.perf_counter() - start, 4)})
    if not sys.stdin.readline():
        raise RuntimeError("standard input was closed before a line came")
    report(mapped_kib(options.path.parents[1], "Pss", "Private_Dirty"))
    sys.stdin.read()


if __name__ == "__main__":
    run(main)
