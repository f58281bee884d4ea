"""Infer some times with a checkpoint, wait until its weights are no longer this process's own, and tell what they take.

Reports a line when ready, and after each line of input another with what the weights take of memory at that time.
"""

import argparse
import hashlib
import statistics
import sys
import time
from pathlib import Path

import mxnet as mx
from common import mapped_kib, report, run, seeded_array

PATIENCE_S = 60
LEAST_KIB = 1024
"""What is not worth folding."""


def weights_kib(directory: Path) -> dict[str, int]:
    """What the files in a directory, and what was made of them, take in this process."""
    return mapped_kib(directory, "Pss", "Anonymous")


def main() -> None:
    """Infer, wait, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--inferences", type=int, default=10)
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    options = parser.parse_args()
    network = mx.gluon.SymbolBlock.imports(
        str(options.directory / "symbol.json"), ["data"], str(options.directory / "params")
    )
    image = mx.nd.array(seeded_array((1, 3, options.size, options.size)))

    def infer() -> tuple[float, str]:
        began = time.perf_counter()
        output = network(image).asnumpy()
        return time.perf_counter() - began, hashlib.sha256(output.tobytes()).hexdigest()

    before = [infer() for _ in range(options.inferences)]
    own_kib = weights_kib(options.directory)["Anonymous"]
    deadline = time.monotonic() + PATIENCE_S
    # Parts of pages that two arrays lie in stay.
    while weights_kib(options.directory)["Anonymous"] > max(LEAST_KIB, own_kib / 10) and time.monotonic() < deadline:
        time.sleep(0.2)
    after = [infer() for _ in range(options.inferences)]
    report(
        {
            "own_kib": own_kib,
            "outputs": sorted({output for _, output in before + after}),
            "before_s": statistics.median(took for took, _ in before[1:]),
            "after_s": statistics.median(took for took, _ in after),
        }
    )
    for _ in sys.stdin:
        report(weights_kib(options.directory))


if __name__ == "__main__":
    run(main)
