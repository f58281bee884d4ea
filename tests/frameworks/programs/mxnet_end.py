"""End while threads infer or load, or while an inference is under way. Knows of no file system."""

import argparse
import os
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx
from common import run

WAYS = ("inferring", "loading", "raising")
BATCH = (64, 3, 64, 64)


def build(directory: Path) -> None:
    """Save a network with some megabytes of weights."""
    network = mx.gluon.model_zoo.vision.resnet18_v1(classes=10)
    network.initialize(mx.init.Xavier())
    network.hybridize()
    network(mx.nd.ones((1, *BATCH[1:]))).wait_to_read()
    network.export(str(directory / "net"))


def _load(directory: Path) -> object:
    symbol, params = (str(directory / name) for name in ("net-symbol.json", "net-0000.params"))
    return mx.gluon.SymbolBlock.imports(symbol, ["data"], params)


def _for_ever(directory: Path, batch: object, *, anew: bool) -> None:
    network = _load(directory)
    while True:
        network = _load(directory) if anew else network
        network(batch).asnumpy()  # type: ignore[operator]


def main() -> None:
    """Save the network, or end in one of the ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("way", choices=("build", *WAYS))
    options = parser.parse_args()
    batch = mx.nd.ones(BATCH)
    if options.way == "build":
        build(options.directory)
    elif options.way == "raising":
        network = _load(options.directory)
        outputs = [network(batch) for _ in range(3)]  # type: ignore[operator]
        raise SystemExit(len(outputs))
    else:
        for _ in range(2):
            anew = options.way == "loading"
            threading.Thread(
                target=_for_ever,
                args=(options.directory, batch[:4] if anew else batch),
                kwargs={"anew": anew},
                daemon=True,
            ).start()
        time.sleep(1)


if __name__ == "__main__":
    run(main)
