"""Load a NumPy array by path as a read-only mapping."""

import argparse
import time
from pathlib import Path

import numpy as np
from common import digest, report, run


def main() -> None:
    """Map `weights.npy`, read all of it twice, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    path = parser.parse_args().directory / "weights.npy"

    start = time.perf_counter()
    array = np.load(path, mmap_mode="r")
    load_s = time.perf_counter() - start
    report(
        {
            "load_s": round(load_s, 4),
            "shape": array.shape,
            "sum": float(array.sum(dtype=np.float64)),
            "tensors_sha256": digest([array.data]),
        }
    )


if __name__ == "__main__":
    run(main)
