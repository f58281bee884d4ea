"""PyTorch's pickled weights."""

from pathlib import Path

import torch

from tests.engines.programs.common import floats, main

WIDTH, LAYERS = 2048, 6


def network(layers: int) -> torch.nn.Module:
    """A perceptron."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))).eval()


def build(directory: Path, divide: int) -> None:
    """Its weights."""
    torch.save(network(max(1, LAYERS // divide)).state_dict(), directory / "weights.pt")


def used(model: torch.nn.Module) -> tuple[object, bytes]:
    """What it computes."""
    with torch.no_grad():
        return model, floats(model(torch.ones(1, WIDTH))[0, :64].tolist())


def weights(directory: Path, *, mmap: bool) -> tuple[object, bytes]:
    """``torch.load``, and the parameters as they are."""
    state = torch.load(directory / "weights.pt", mmap=mmap, weights_only=True)
    with torch.device("meta"):
        model = network(len(state) // 2)
    model.load_state_dict(state, assign=True)
    return used(model)


if __name__ == "__main__":
    main(
        build,
        {
            "load": ("weights.pt", lambda directory: weights(directory, mmap=False)),
            "load-mmap": ("weights.pt", lambda directory: weights(directory, mmap=True)),
        },
    )
