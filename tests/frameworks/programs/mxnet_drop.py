"""Drop loaded arrays in different ways; report seconds until their file is mapped no more, or none when it still is."""

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import mxnet as mx
from common import report, run

import trimsfs

PATIENCE_S = 15


def _mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def _dropped(path: Path, use: Callable[[str], object]) -> float | None:
    use(str(path))
    assert _mapped(path)
    gc.collect()
    began = time.monotonic()
    while _mapped(path) and time.monotonic() < began + PATIENCE_S:
        time.sleep(0.05)
    return None if _mapped(path) else time.monotonic() - began


def _alias(path: str) -> None:
    """A part of an array outlives the array, and all looks at what was loaded, and then goes by itself."""
    part = mx.nd.load(path)["arg:weight"][1:]
    time.sleep(3)
    assert _mapped(Path(path))
    del part


def _model(path: str) -> None:
    trimsfs.open(path).mxnet()["arg:weight"].wait_to_read()


def _lent(path: str) -> None:
    """A program that takes an array by DLPack ends folding."""
    loaded = mx.nd.load(path)
    mx.nd.from_dlpack(mx.nd.to_dlpack_for_read(loaded["arg:weight"])).wait_to_read()


WAYS: dict[str, Callable[[str], object]] = {
    "loaded": mx.nd.load,
    "alias": _alias,
    "model": _model,
    "lent": _lent,
    "loaded after it": mx.nd.load,
}


def main() -> None:
    """Save arrays, or load and drop them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    if options.build:
        mx.nd.save(str(options.path), {"arg:weight": mx.nd.ones((512, 512)), "arg:bias": mx.nd.ones((512,))})
    else:
        report({name: _dropped(options.path, use) for name, use in WAYS.items()})


if __name__ == "__main__":
    run(main)
