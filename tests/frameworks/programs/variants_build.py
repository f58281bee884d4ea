"""Build a ResNet-50 and a ViT-B/16 of torchvision, and fine-tuned variants of them, for PyTorch and safetensors."""

import argparse
import copy
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from common import build, run
from variants import VARIANTS, variant_of

MODELS = {
    "ResNet-50": ("resnet50", ["fc."], ["layer4."]),
    "ViT-B16": ("vit_b_16", ["heads."], ["encoder.layers.encoder_layer_11."]),
}
"""torchvision's name, and what the names of the last layer's and the last block's weights begin with."""


def weights_of(model: str, classes: int) -> "dict[str, torch.Tensor]":
    """Random weights, the same for the same arguments."""
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = torchvision.models.get_model(
        model, weights=None, num_classes=classes
    ).state_dict()
    return weights


def write_variant(directory: Path, model: str, variant: str) -> None:
    """Write a variant; for PyTorch, which writes the file's name into the file, also under another name."""
    name, head, block = MODELS[model]
    base, other = weights_of(name, 1000), weights_of(name, 10)
    arrays, others = ({key: tensor.numpy() for key, tensor in weights.items()} for weights in (base, other))
    weights = copy.copy(base)  # it keeps what PyTorch writes beside the tensors
    for key, array in variant_of(arrays, others, variant, head=head, block=block).items():
        weights[key] = torch.from_numpy(array.copy())
    torch.save(weights, directory / "model.pt")
    torch.save(weights, directory / "renamed.pt")
    safetensors.torch.save_file(weights, directory / "model.safetensors")


def main() -> None:
    """Build all variants below the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    for model in MODELS:
        for variant in VARIANTS:
            build(
                directory / model / variant,
                ("model.pt", "model.safetensors", "renamed.pt"),
                partial(write_variant, model=model, variant=variant),
            )


if __name__ == "__main__":
    run(main)
