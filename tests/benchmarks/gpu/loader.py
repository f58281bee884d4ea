"""A model as tensors on a GPU, in a process of its own: ``python -m tests.benchmarks.gpu.loader WAY PATH``.

Imports what it needs, makes the CUDA context unless ``--context=0``, and prints ``ready``. At the first line that it is
sent it loads, and prints JSON: seconds, and bytes of memory of the host that it took meanwhile at most. It keeps the
tensors; at the second it prints the checksum of one of them, at the third it ends.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE = "cuda:0"
Tensors = dict[str, Any]


def trimsfs(path: str, device: str) -> Tensors:
    """The copy that the mount lends: as PyTorch's tensors, or, where no PyTorch knows CUDA, as trimsfs's own."""
    client = importlib.import_module("trimsfs.client")
    there = client.open(path).to(device)
    tensors: Tensors = there.torch() if _torch_has_cuda() else there.tensors
    return tensors


def torch_load(path: str, device: str) -> Tensors:
    """Read, unpickled, and copied."""
    return _moved(_torch().load(path, map_location="cpu", weights_only=True), device)


def torch_load_mmap(path: str, device: str) -> Tensors:
    """Mapped, and copied."""
    return _moved(_torch().load(path, map_location="cpu", weights_only=True, mmap=True), device)


def safetensors(path: str, device: str) -> Tensors:
    """As its documentation has it."""
    library = importlib.import_module("safetensors.torch")
    tensors: Tensors = library.load_file(path, device=device)
    return tensors


def fastsafetensors(path: str, device: str) -> Tensors:
    """Without GPUDirect Storage, which would go round the page cache, and which a mount does not have."""
    library = importlib.import_module("fastsafetensors")
    loader = library.SafeTensorsFileLoader(library.SingleGroup(), device, nogds=True)
    loader.add_filenames({0: [path]})
    buffers = loader.copy_files_to_device()
    tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
    _kept.append((loader, buffers))
    return tensors


def runai(path: str, device: str) -> Tensors:
    """As its documentation has it."""
    library = importlib.import_module("runai_model_streamer")
    with library.SafetensorsStreamer() as streamer:
        streamer.stream_file(path, device=device)
        return {name: tensor.to(device) for name, tensor in streamer.get_tensors()}


def convert(path: str, device: str) -> Tensors:
    """Written for ``torch.load``, beside the file."""
    del device
    tensors: Tensors = importlib.import_module("trimsfs.client").open(path).torch()
    _torch().save(tensors, Path(path).with_suffix(".pt"))
    return tensors


_kept: list[object] = []


@dataclass(frozen=True, slots=True)
class Way:
    """How a file becomes tensors, and what is imported for it; *needed* of that has to be there."""

    load: Callable[[str, str], Tensors]
    needed: tuple[str, ...]
    wanted: tuple[str, ...] = ()


WAYS = {
    "trimsfs": Way(trimsfs, ("trimsfs.extras.gpu.client.frameworks",), ("torch",)),
    "torch_load": Way(torch_load, ("torch",)),
    "torch_load_mmap": Way(torch_load_mmap, ("torch",)),
    "safetensors": Way(safetensors, ("torch", "safetensors.torch")),
    "fastsafetensors": Way(fastsafetensors, ("torch", "fastsafetensors")),
    "runai": Way(runai, ("torch", "runai_model_streamer")),
    "convert": Way(convert, ("torch",)),
}


def _torch() -> Any:
    return importlib.import_module("torch")


def _torch_has_cuda() -> bool:
    """Whether there is a PyTorch made for CUDA; asks nothing of the driver."""
    return "torch" in sys.modules and _torch().version.cuda is not None


def _moved(tensors: Tensors, device: str) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _make_context(way: Way) -> None:
    """As the first use of CUDA does: by PyTorch, or by the driver where that is not used."""
    if "torch" in way.needed or _torch_has_cuda():
        _torch().zeros(1, device=DEVICE)
        _torch().cuda.synchronize()
    else:
        cuda = importlib.import_module("trimsfs.extras.gpu.cuda")
        cuda.Context(cuda.devices()[0].ordinal).enter()


def _checksum(tensor: Any) -> int:
    """CRC-32 of a tensor's bytes."""
    if hasattr(tensor, "raw"):
        return zlib.crc32(tensor.raw().numpy())
    return zlib.crc32(tensor.cpu().reshape(-1).view(_torch().uint8).numpy())


def _resident(field: str) -> int:
    """Bytes of this process's memory, by ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Import, wait for the word, load, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("path")
    parser.add_argument("--probe", required=True, help="the tensor whose checksum is told")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--torch", type=int, default=1, help="0: trimsfs does without, as with a driver it cannot use")
    options = parser.parse_args()
    way = WAYS[options.way]
    for name in way.needed:
        importlib.import_module(name)
    for name in way.wanted:
        if options.torch and importlib.util.find_spec(name):
            importlib.import_module(name)
    on_gpu = options.device != "cpu" and options.way != "convert"
    if on_gpu and options.context:
        _make_context(way)
    Path("/proc/self/clear_refs").write_text("5")  # the highest use of memory is counted from here
    before = _resident("VmRSS")
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    tensors = way.load(options.path, options.device)
    if on_gpu and _torch_has_cuda():
        _torch().cuda.synchronize()
    seconds = time.perf_counter() - begun
    peak = _resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)
    sys.stdin.readline()
    print(json.dumps({"checksum": _checksum(tensors[options.probe])}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
