"""Write a Llama of random weights in about so many shards with their index:
``llama_build DIRECTORY LAYERS WIDTH SHARDS``."""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 16000
FEED_FORWARD = 2.75
HEAD = 128
SLACK = 16 << 20
"""Bytes by which a shard may be larger than a tenth: tensors are not divided."""


def main() -> None:
    """Build it and save it as transformers does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("layers", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("shards", type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=options.width,
            intermediate_size=int(options.width * FEED_FORWARD),
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // HEAD,
        )
    )
    nbytes = sum(each.nbytes for each in model.parameters())
    model.save_pretrained(options.directory, max_shard_size=-(-nbytes // options.shards) + SLACK)
    for path in options.directory.iterdir():
        path.chmod(0o644)  # safetensors makes files that only their owner may read


if __name__ == "__main__":
    main()
