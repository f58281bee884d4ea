"""A lease of a copy: its open control file, which tells where the copy is; the kernel closes it with the process."""

import errno
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimsfs import cuda
from trimsfs.client.file_state import on_mount
from trimsfs.client.gpu import fork_safety
from trimsfs.client.gpu.errors import GpuError, GpuFullError, GpuLostError
from trimsfs.formats import DTYPE_BITS, Tensor

_PIECE = 1 << 20
_LOST = "the mount does not keep it any more: open the model again"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDescription:
    """Where a copy is: an allocation of ``size`` bytes, of which the first ``nbytes`` are used.

    ``format`` is None, and there are no tensors, for an image of a file of unknown format. Offsets of tensors are in
    the allocation. ``memory`` is ``"vmm"``, with a ``socket`` that gives a descriptor for the ``token``, or ``"ipc"``,
    with a ``handle``.
    """

    device: str
    generation: str
    memory: str
    size: int
    nbytes: int
    format: str | None
    tensors: tuple[Tensor, ...]
    socket: str = ""
    token: str = ""
    handle: bytes = b""


class Lease:
    """The open control file of a copy."""

    def __init__(self, path: Path, descriptor: fork_safety.Descriptor) -> None:
        self._path = path
        self._descriptor = descriptor

    def __reduce__(self) -> Any:
        raise TypeError(f"{self._path}: another process takes a lease of its own: open the model there")

    def description(self) -> CopyDescription:
        """Where the copy is, now. Raises GpuError, GpuLostError."""
        data = bytearray()
        try:
            while piece := os.pread(self._held_descriptor(), _PIECE, len(data)):
                data += piece
        except OSError as error:
            raise self._lost(error) from None
        try:
            return _description(json.loads(data))
        except (ValueError, KeyError, TypeError) as error:
            raise GpuError(f"{self._path}: not understood: {error!r}: are client and server of one version?") from None

    def check(self) -> None:
        """Raises GpuLostError when the copy is not kept any more."""
        try:
            os.pread(self._held_descriptor(), 1, 0)
        except OSError as error:
            raise self._lost(error) from None

    @property
    def held(self) -> bool:
        """Whether this process holds it: not one that was forked since."""
        return self._descriptor.number >= 0

    def close(self) -> None:
        """Give it back. A second call does nothing."""
        self._descriptor.close()

    def _held_descriptor(self) -> int:
        if not self.held:
            raise GpuLostError(f"{self._path}: this process was forked from the one that has it: open the model here")
        return self._descriptor.number

    def _lost(self, error: OSError) -> GpuError:
        if error.errno == errno.ESTALE:
            return GpuLostError(f"{self._path}: {_LOST}")
        if error.errno in {errno.ENOTCONN, errno.ECONNABORTED}:
            return GpuLostError(f"{self._path}: the mount is gone, and nothing keeps the copy: mount it again")
        return GpuError(f"{self._path}: {error.strerror}")


def take(model: Path, file: io.FileIO, device: cuda.DeviceInfo, pattern: str | None, memory: str) -> Lease:
    """Take a lease of the copy of a *model*, whose open *file* tells whether it is on a mount.

    Waits until the copy is there. Raises GpuError, GpuFullError.
    """
    there = Path(os.path.realpath(model))  # a link's neighbours are others
    path = there.parent / ".trims" / there.name / "gpu" / _name(device.uuid, pattern, memory)
    try:
        return Lease(path, fork_safety.open_file(path))
    except OSError as error:
        raise _refused(error, model, file, path, pattern) from None


def _name(uuid: str, pattern: str | None, memory: str) -> str:
    if memory not in {"vmm", "ipc"}:
        raise ValueError(f"memory is 'vmm' or 'ipc', not {memory!r}")
    if pattern == "" or (pattern is not None and "\0" in pattern):
        raise ValueError(f"not a pattern of names of tensors: {pattern!r}")
    quoted = "" if pattern is None else "@" + pattern.replace("%", "%25").replace("/", "%2F")
    return f"{uuid}{'.ipc' if memory == 'ipc' else ''}{quoted}"


def _refused(error: OSError, model: Path, file: io.FileIO, path: Path, pattern: str | None) -> GpuError:
    where, device = path.parent, path.name.partition("@")[0].removesuffix(".ipc")
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR if not on_mount(file):
            return GpuError(f"{model}: not on a trimsfs mount: only models on one are shared in a device's memory")
        case errno.ENOENT | errno.ENOTDIR:
            known = ", ".join(_names(where))
            if not os.path.exists(where.parent):
                return GpuError(
                    f"{model}: only the file is here: have the directory that it is in brought here as well"
                )
            if not known:
                return GpuError(f"{model}: its mount lends nothing on GPUs: trimsfs status tells why")
            if device in known and pattern is not None:
                return GpuError(f"{model}: no tensor's name matches {pattern!r}")
            return GpuError(f"{model}: its mount lends on {known}, and not on {device}; or the model is gone")
        case errno.ENOMEM:
            return GpuFullError(f"{model}: no room on {device}: the log of the mount tells what fills it")
        case errno.EACCES | errno.EPERM:
            return GpuError(f"{model}: {error.strerror}: who may read a model may not always have it on {device}")
        case errno.ENAMETOOLONG:
            return GpuError(f"{model}: the pattern is too long for a name of a file: give several shorter ones")
        case errno.EIO:
            return GpuError(f"{model}: it could not be loaded to {device}: the log of the mount tells why")
    return GpuError(f"{path}: {error.strerror}")


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _description(told: dict[str, Any]) -> CopyDescription:
    """Raises ValueError, KeyError, TypeError."""
    tensors = tuple(
        Tensor(each["name"], each["dtype"], tuple(map(int, each["shape"])), int(each["offset"]), int(each["nbytes"]))
        for each in told["tensors"]
    )
    description = CopyDescription(
        device=told["device"],
        generation=told["generation"],
        memory=told["memory"],
        size=int(told["size"]),
        nbytes=int(told["nbytes"]),
        format=told["format"],
        tensors=tensors,
        socket=told.get("socket", ""),
        token=told.get("token", ""),
        handle=bytes.fromhex(told.get("ipc_handle", "")),
    )
    if not 0 <= description.nbytes <= description.size:
        raise ValueError("more bytes than the allocation has")
    for each in tensors:
        _check(each, description)
    if description.memory == "ipc" and len(description.handle) != cuda.IPC_HANDLE_SIZE:
        raise ValueError(f"a handle of {len(description.handle)} bytes")
    return description


def _check(tensor: Tensor, description: CopyDescription) -> None:
    """Raises ValueError: frameworks would go by a shape into memory that is another's."""
    end = description.nbytes if tensor.nbytes else description.size  # what is empty may be said to be behind the last
    if not 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= end:
        raise ValueError(f"tensor {tensor.name!r} outside of the allocation")
    bits = DTYPE_BITS.get(tensor.dtype)  # None for blocks of quantised weights
    if min(tensor.shape, default=0) < 0 or tensor.nbytes < 0:
        raise ValueError(f"tensor {tensor.name!r} of a negative size")
    if bits is not None and -(-math.prod(tensor.shape) * bits // 8) != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} of {tensor.nbytes} bytes, which its type and shape do not have")
