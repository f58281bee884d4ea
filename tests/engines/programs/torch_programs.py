"""PyTorch's formats of whole programs: TorchScript, and exported ones."""

from pathlib import Path

import torch

from tests.engines.programs.common import main
from tests.engines.programs.torch_formats import LAYERS, WIDTH, network, used


def build(directory: Path, divide: int) -> None:
    """The same network in each."""
    model, example = network(max(1, LAYERS // divide)), torch.ones(1, WIDTH)
    torch.jit.trace(model, example).save(directory / "script.pt")
    torch.export.save(torch.export.export(model, (example,)), directory / "program.pt2")


if __name__ == "__main__":
    main(
        build,
        {
            "jit": ("script.pt", lambda directory: used(torch.jit.load(directory / "script.pt"))),
            "export": ("program.pt2", lambda directory: used(torch.export.load(directory / "program.pt2").module())),
        },
    )
