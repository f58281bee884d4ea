"""transformers: a Llama in shards, whole, placed by ``device_map``, and one with tied embeddings."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engines.programs.common import floats, main

SHARD = 40 << 20


def build(directory: Path, divide: int) -> None:
    """Two models of random weights."""
    for name, tied in (("whole", False), ("tied", True)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=12 // divide,
            num_attention_heads=8,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).save_pretrained(directory / name, max_shard_size=SHARD // divide)


def _load(directory: Path, name: str, **options: str) -> tuple[object, bytes]:
    model = LlamaForCausalLM.from_pretrained(directory / name, **options)
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits[0, -1]
    return model, floats(logits[:64].float().tolist())


if __name__ == "__main__":
    main(
        build,
        {
            "whole": ("whole/*", lambda directory: _load(directory, "whole")),
            "device-map": ("whole/*", lambda directory: _load(directory, "whole", device_map="cpu")),
            "tied": ("tied/*", lambda directory: _load(directory, "tied")),
        },
    )
