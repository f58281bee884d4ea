"""Build a model directory for PyTorch: the weights of one ResNet-18."""

import argparse
from pathlib import Path

import torch
import torchvision
from common import build, run


def write_weights(directory: Path) -> None:
    """Write the weights."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), directory / "model.pt")


def main() -> None:
    """Build the model in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    build(parser.parse_args().directory, ("model.pt",), write_weights)


if __name__ == "__main__":
    run(main)
