"""Open model files by ``trimsfs.client``, and report what it makes of them, and what stays shared."""

import argparse
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import report, run

import trimsfs.client


def facts_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
    """Of each array: dtype, shape and CRC of the bytes."""
    return {name: [str(array.dtype), list(array.shape), zlib.crc32(array.tobytes())] for name, array in arrays.items()}


def private_kib(path: Path) -> int:
    """How much of this process's mappings of a file is its own."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Anonymous:"):
            total += int(line.split()[1])
    return total


def main() -> None:
    """Open every file named on the command line as NumPy arrays, or as PyTorch tensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("paths", type=Path, nargs="+")
    options = parser.parse_args()
    files = {}
    for path in options.paths:
        model = trimsfs.client.open(path)
        if options.torch:
            import torch

            tensors = model.torch()
            arrays = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
            facts = {
                name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), zlib.crc32(arrays[name].tobytes())]
                for name, tensor in tensors.items()
            }
        else:
            arrays = model.numpy()
            facts = facts_of(arrays)
        before = private_kib(path)
        name, array = max(arrays.items(), key=lambda item: item[1].nbytes)
        del model  # tensors keep what they need
        array.reshape(-1)[:1] = 1
        again = trimsfs.client.open(path)
        tensor = next(tensor for tensor in again.table.tensors if tensor.name == name)
        unchanged = zlib.crc32(again.raw(tensor)) == facts[name][2]
        files[path.name] = {"facts": facts, "private_kib": before, "others_unchanged": unchanged}
    report({"files": files})


if __name__ == "__main__":
    run(main)
