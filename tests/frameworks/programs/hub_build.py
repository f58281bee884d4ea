"""Build what transformers publishes, a small Llama in shards and a tokenizer; tell what it computes from there."""

import json
import sys
from pathlib import Path

import torch
from hub_load import outputs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main(directory: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size=8 << 20)
    words = {word: number for number, word in enumerate(["<unk>", *(f"w{number}" for number in range(999))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    print(json.dumps(outputs(directory)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
