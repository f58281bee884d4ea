"""Load an ONNX model with external data by path, and run it once."""

import argparse
import time
from pathlib import Path

import onnxruntime
from common import digest, report, run, seeded_array


def main() -> None:
    """Open a session on `model.onnx`, infer on a seeded input, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    path = parser.parse_args().directory / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    (first,) = session.get_inputs()
    (output,) = session.run(None, {first.name: seeded_array(tuple(first.shape))})
    inferred = time.perf_counter()
    report(
        {
            "load_s": round(loaded - start, 4),
            "infer_s": round(inferred - loaded, 4),
            "output_sha256": digest([output.data]),
        }
    )


if __name__ == "__main__":
    run(main)
