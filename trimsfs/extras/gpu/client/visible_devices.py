"""Finds a device among those that this process sees, by its ordinal or UUID."""

import re

from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.client.gpu_errors import GpuError

_DEVICE = re.compile(r"(?:cuda:)?(?P<ordinal>\d+)|(?P<first>cuda)|(?P<uuid>GPU-[0-9a-f-]{36})")


def find(device: str | int) -> cuda.DeviceInfo:
    """The device for ``"cuda"``, ``"cuda:N"``, ``N`` or ``"GPU-…"``. Raises GpuError."""
    meant = _DEVICE.fullmatch(str(device))
    if meant is None:
        raise GpuError(
            f"unknown device {str(device)!r}: give 'cuda', 'cuda:N', N or a UUID as nvidia-smi -L lists them"
        )
    try:
        devices = cuda.devices()
    except cuda.CudaError as error:
        raise GpuError(_cause(error)) from None
    if meant["uuid"]:
        matches = [each for each in devices if each.uuid == meant["uuid"]]
    else:
        matches = [each for each in devices if each.ordinal == int(meant["ordinal"] or 0)]
    if not matches:
        seen = ", ".join(f"cuda:{each.ordinal} is {each.uuid}" for each in devices) or "none"
        raise GpuError(f"no device {device} in this process, which sees {seen}: check CUDA_VISIBLE_DEVICES")
    return matches[0]


def _cause(error: cuda.CudaError) -> str:
    if "CUDA_ERROR_NOT_INITIALIZED" in str(error):
        return (
            "this process was forked from one that uses CUDA, and CUDA does not survive a fork: start a new process, "
            "as multiprocessing does with 'spawn'"
        )
    return str(error)
