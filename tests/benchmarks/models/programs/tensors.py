"""Copy all tensors of a directory's shards to memory of this process's own."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from tests.benchmarks.models.programs.common import serve

PAGE = 4096


def load(path: str) -> Callable[[], bytes]:
    """All tensors."""
    tensors = {}
    for shard in sorted(Path(path).glob("*.safetensors")):
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                tensors[name] = opened.get_tensor(name).clone()
    return lambda: digest(tensors)


def digest(tensors: dict[str, torch.Tensor]) -> bytes:
    """A byte of each page of all."""
    total = sum(int(tensor.view(torch.uint8).flatten()[::PAGE].sum()) for tensor in tensors.values())
    return str(total).encode()


if __name__ == "__main__":
    serve(load, infers=False)
