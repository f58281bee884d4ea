"""Load a safetensors file by path, lazily and at once, as PyTorch tensors."""

import argparse
import time
from pathlib import Path

import safetensors
import safetensors.torch
from common import digest, report, run


def main() -> None:
    """Load `model.safetensors` in both ways, require that they agree, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    path = parser.parse_args().directory / "model.safetensors"

    start = time.perf_counter()
    with safetensors.safe_open(path, framework="pt") as file:
        keys = sorted(file.keys())
        lazily = digest(file.get_tensor(key).numpy().data for key in keys)
    safe_open_s = time.perf_counter() - start

    start = time.perf_counter()
    weights = safetensors.torch.load_file(path)
    load_file_s = time.perf_counter() - start
    at_once = digest(weights[key].numpy().data for key in sorted(weights))
    if at_once != lazily:
        raise RuntimeError(f"load_file gave {at_once}, safe_open gave {lazily}")

    report(
        {
            "safe_open_s": round(safe_open_s, 4),
            "load_file_s": round(load_file_s, 4),
            "tensors": len(keys),
            "tensors_sha256": at_once,
        }
    )


if __name__ == "__main__":
    run(main)
