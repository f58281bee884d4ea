"""Load a Llama by transformers, and compute the first token after a few."""

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from tests.benchmarks.models.programs.common import serve

TOKENS = 16


def load(path: str) -> Callable[[], bytes]:
    """The model of a directory."""
    model = LlamaForCausalLM.from_pretrained(path)

    def infer() -> bytes:
        with torch.no_grad():
            logits = model(torch.arange(TOKENS)[None]).logits[0, -1]
        return bytes(logits.float().numpy())

    return infer


if __name__ == "__main__":
    serve(load)
