"""Save a small Llama in shards by transformers, or load it by ``trimsfs.open`` and by transformers and compare."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from common import report, run
from transformers import LlamaConfig, LlamaForCausalLM

import trimsfs

TOKENS = 16


def build(directory: Path) -> None:
    """Save it in some shards with their index."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(directory, max_shard_size="200KB")
    report({"shards": sorted(path.name for path in directory.glob("*.safetensors"))})


def mapped(directory: Path) -> list[tuple[int, int, str]]:
    """This process's mappings of files of a directory: start, end, name."""
    lines = re.findall(rf"([0-9a-f]+)-([0-9a-f]+) .* {directory}/(\S+)\n", Path("/proc/self/maps").read_text())
    return [(int(start, 16), int(end, 16), name) for start, end, name in lines]


def facts_of(llama: Any, directory: Path) -> dict[str, Any]:
    """What it computes, and which of its parameters lie in no mapping of the files."""
    places = mapped(directory)
    with torch.no_grad():
        logits = llama(torch.arange(TOKENS)[None]).logits
    return {
        "logits": logits.flatten()[::97].tolist(),
        "copied": [
            name
            for name, parameter in llama.named_parameters()
            if not any(start <= parameter.data_ptr() < end for start, end, _ in places)
        ],
    }


def load(directory: Path) -> None:
    """Load it in each way."""
    model = trimsfs.open(directory)
    weights = model.torch("lm_head.*")
    first = sorted({name for _, _, name in mapped(directory)})
    weights = model.state_dict()
    config = LlamaConfig.from_pretrained(directory)
    module = LlamaForCausalLM(config)
    module.load_state_dict(weights, assign=True)
    native = LlamaForCausalLM.from_pretrained(directory)
    expected = native.state_dict()
    report(
        {
            "first": first,
            "equal": weights.keys() == expected.keys()
            and all(torch.equal(tensor, expected[name]) for name, tensor in weights.items()),
            "arrays": all((array == expected[name].numpy()).all() for name, array in model.numpy().items()),
            "native": facts_of(native, directory),
            "load_state_dict": facts_of(module, directory),
            "from_pretrained": facts_of(
                LlamaForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict()), directory
            ),
        }
    )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("do", choices=["build", "load"])
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    (build if options.do == "build" else load)(options.directory)


if __name__ == "__main__":
    run(main)
