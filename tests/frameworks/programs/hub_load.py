"""Load a model by its name on the hub, as any program does, once told to; its output, and which file it read."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer


def outputs(name: str | Path) -> dict[str, Any]:
    """What a model computes, by its name or from a directory."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    tokens = tokenizer("w1 w2 w3 w500 unknown", return_tensors="pt")
    with torch.no_grad():
        logits = model(tokens["input_ids"]).logits[0, -1]
    return {"tokens": tokens["input_ids"].tolist(), "logits": logits.tolist()}


def main(name: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    report = outputs(name)
    index = try_to_load_from_cache(name, "model.safetensors.index.json")
    assert isinstance(index, str)
    files = sorted(Path(index).parent.glob("*.safetensors"))
    report["files"] = [[str(path), path.stat().st_dev, path.stat().st_ino] for path in files]
    assert Path(snapshot_download(name)) == Path(index).parent
    cached = scan_cache_dir()
    assert not cached.warnings, cached.warnings
    report["repositories"] = sorted(repository.repo_id for repository in cached.repos)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
