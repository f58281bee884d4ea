"""safetensors, and loaders of its files: whole, by slices, by Run:ai's streamer, fastsafetensors and ``O_DIRECT``."""

import mmap
import os
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engines.programs.common import floats, main

NAME = "model.safetensors"
BLOCK = 1 << 20


def build(directory: Path, divide: int) -> None:
    """A model of a hundred matrices."""
    torch.manual_seed(0)
    save_file({f"layers.{number:03}": torch.randn(512, 512) for number in range(100 // divide)}, directory / NAME)


def _sums(tensors: dict[str, torch.Tensor]) -> tuple[object, bytes]:
    return tensors, floats([tensors[name].sum(dtype=torch.float64).item() for name in sorted(tensors)])


def sliced(directory: Path) -> tuple[object, bytes]:
    """Each tensor by itself."""
    with safe_open(directory / NAME, framework="pt") as file:
        return _sums({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping


def streamed(directory: Path) -> tuple[object, bytes]:
    """Run:ai's streamer."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(directory / NAME))
        return _sums({name: tensor.clone() for name, tensor in streamer.get_tensors()})


def fast(directory: Path) -> tuple[object, bytes]:
    """fastsafetensors, without GPUDirect."""
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[str(directory / NAME)], nogds=True, device="cpu", debug_log=False) as file:
        return _sums({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118 - no mapping


def direct(directory: Path) -> tuple[object, bytes]:
    """A reader that passes the page cache by."""
    buffer = mmap.mmap(-1, BLOCK)
    descriptor = os.open(directory / NAME, os.O_RDONLY | os.O_DIRECT)
    checksum = at = 0
    try:
        while size := os.preadv(descriptor, [buffer], at):
            checksum, at = zlib.crc32(buffer[:size], checksum), at + size
    finally:
        os.close(descriptor)
    return buffer, f"{at} {checksum}".encode()


if __name__ == "__main__":
    main(
        build,
        {
            "load-file": (NAME, lambda directory: _sums(load_file(directory / NAME))),
            "safe-open": (NAME, sliced),
            "runai": (NAME, streamed),
            "fastsafetensors": (NAME, fast),
            "o-direct": (NAME, direct),
        },
    )
