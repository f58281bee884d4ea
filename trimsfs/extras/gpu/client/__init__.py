"""The client library for GPUs: maps a mount's copies in device memory, and returns their tensors without a copy."""

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trimsfs.client.patterns import Patterns, listed
from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.client.device_model import DeviceModel
from trimsfs.extras.gpu.client.device_tensor import DeviceTensor
from trimsfs.extras.gpu.client.gpu_errors import GpuError, GpuFullError, GpuLostError
from trimsfs.extras.gpu.client.mapped_copy import map_copy
from trimsfs.extras.gpu.client.visible_devices import find

__all__ = ["DeviceModel", "DeviceTensor", "GpuError", "GpuFullError", "GpuLostError", "load"]

_TRIES = 3

with suppress(cuda.CudaUnavailableError):
    cuda.bindings()  # now: a program may enter a sandbox that hides its libraries before it loads a model


def load(path: Path, file: io.FileIO, device: str | int, tensors: Patterns, memory: str) -> DeviceModel:
    """Lease copies of the *file* that is open at *path*, as `trimsfs.client.model.Model.to` describes."""
    info = find(device)
    patterns: Sequence[str | None] = [None] if tensors is None else listed(tensors)
    for _ in range(_TRIES):
        copies = [map_copy(path, file, info, pattern, memory) for pattern in patterns]
        if len({copy.description.generation for copy in copies}) == 1:
            return DeviceModel(path, copies)
    raise GpuError(f"{path}: the file was replaced {_TRIES} times while its parts were loaded: try again")
