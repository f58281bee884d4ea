"""Open each shard by safetensors, which maps it, and touch every page of every tensor."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from tests.benchmarks.models.programs.common import serve

PAGE = 4096


def load(path: str) -> Callable[[], bytes]:
    """All tensors of a directory's shards."""
    total = 0
    for shard in sorted(Path(path).glob("*.safetensors")):
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                total += int(opened.get_tensor(name).view(torch.uint8).flatten()[::PAGE].sum())
    return lambda: str(total).encode()


if __name__ == "__main__":
    serve(load, infers=False)
