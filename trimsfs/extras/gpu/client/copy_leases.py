"""Takes leases of copies: an open control file is a lease, and its content describes the copy.

The lease ends when the file is closed, at the latest with the process.
"""

import errno
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimsfs.client.file_state import on_mount
from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.client import fork_safety
from trimsfs.extras.gpu.client.gpu_errors import GpuError, GpuFullError, GpuLostError
from trimsfs.formats import DTYPE_BITS, Tensor

_PIECE = 1 << 20
_LOST = "the mount has ended this lease: open the model again"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDescription:
    """A copy: an allocation of ``size`` bytes, of which the first ``nbytes`` are used.

    For a file of unknown format, ``format`` is None and there are no tensors. Tensor offsets are in the allocation.
    ``memory`` is ``"vmm"``, where the server at ``socket`` sends a descriptor for the ``token``, or ``"ipc"``, where
    ``handle`` is a CUDA IPC handle.
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
        raise TypeError(f"{self._path}: a lease cannot be pickled: open the model in the other process")

    def description(self) -> CopyDescription:
        """Read the description of the copy. Raises GpuError, GpuLostError."""
        data = bytearray()
        try:
            while piece := os.pread(self._held_descriptor(), _PIECE, len(data)):
                data += piece
        except OSError as error:
            raise self._lost(error) from None
        try:
            return _description(json.loads(data))
        except (ValueError, KeyError, TypeError) as error:
            raise GpuError(
                f"{self._path}: invalid description: {error!r}: update client and server to the same version"
            ) from None

    def check(self) -> None:
        """Check that the lease holds. Raises GpuLostError when the mount has ended it."""
        try:
            os.pread(self._held_descriptor(), 1, 0)
        except OSError as error:
            raise self._lost(error) from None

    @property
    def held(self) -> bool:
        """Whether this process holds the lease; a forked child does not."""
        return self._descriptor.number >= 0

    def close(self) -> None:
        """End the lease. A second call does nothing."""
        self._descriptor.close()

    def _held_descriptor(self) -> int:
        if not self.held:
            raise GpuLostError(f"{self._path}: this process was forked from the lease's holder: open the model here")
        return self._descriptor.number

    def _lost(self, error: OSError) -> GpuError:
        if error.errno == errno.ESTALE:
            return GpuLostError(f"{self._path}: {_LOST}")
        if error.errno in {errno.ENOTCONN, errno.ECONNABORTED}:
            return GpuLostError(f"{self._path}: the mount is gone, and its leases with it: mount it again")
        return GpuError(f"{self._path}: {error.strerror}")


def take(model: Path, file: io.FileIO, device: cuda.DeviceInfo, pattern: str | None, memory: str) -> Lease:
    """Lease the copy of a *model*, which is open as *file*; waits until it is loaded. Raises GpuError, GpuFullError."""
    there = Path(os.path.realpath(model))  # control files lie beside the file itself, not beside links to it
    path = there.parent / ".trims" / there.name / "gpu" / _name(device.uuid, pattern, memory)
    try:
        return Lease(path, fork_safety.open_file(path))
    except OSError as error:
        raise _refused(error, model, file, path, pattern) from None


def _name(uuid: str, pattern: str | None, memory: str) -> str:
    if memory not in {"vmm", "ipc"}:
        raise ValueError(f"memory is 'vmm' or 'ipc', not {memory!r}")
    if pattern == "" or (pattern is not None and "\0" in pattern):
        raise ValueError(f"tensors: {pattern!r} is no pattern of tensor names")
    quoted = "" if pattern is None else "@" + pattern.replace("%", "%25").replace("/", "%2F")
    return f"{uuid}{'.ipc' if memory == 'ipc' else ''}{quoted}"


def _refused(error: OSError, model: Path, file: io.FileIO, path: Path, pattern: str | None) -> GpuError:
    where, device = path.parent, path.name.partition("@")[0].removesuffix(".ipc")
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR if not on_mount(file):
            return GpuError(f"{model} is not on a trimsfs mount: only models on a mount are shared in GPU memory")
        case errno.ENOENT | errno.ENOTDIR:
            known = ", ".join(_names(where))
            if not os.path.exists(where.parent):
                return GpuError(f"{model}: only the file is mounted here: bind-mount its directory instead")
            if not known:
                return GpuError(f"{model}: its mount serves no copies on GPUs: `trimsfs status` says why")
            if device in known and pattern is not None:
                return GpuError(f"{model}: no tensor name matches {pattern!r}")
            return GpuError(f"{model}: its mount serves copies on {known}, not on {device}; or the model was deleted")
        case errno.ENOMEM:
            return GpuFullError(f"{model}: {device} is full: the log of the mount lists what fills it")
        case errno.EACCES | errno.EPERM:
            return GpuError(f"{model}: {error.strerror}: this user may read the model, but not lease it on {device}")
        case errno.ENAMETOOLONG:
            return GpuError(f"{model}: the pattern is too long for a file name: give several shorter ones")
        case errno.EIO:
            return GpuError(f"{model}: the server could not load it to {device}: the log of the mount says why")
    return GpuError(f"{path}: {error.strerror}")


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _description(document: dict[str, Any]) -> CopyDescription:
    """Parse and check a description. Raises ValueError, KeyError, TypeError."""
    tensors = tuple(
        Tensor(each["name"], each["dtype"], tuple(map(int, each["shape"])), int(each["offset"]), int(each["nbytes"]))
        for each in document["tensors"]
    )
    description = CopyDescription(
        device=document["device"],
        generation=document["generation"],
        memory=document["memory"],
        size=int(document["size"]),
        nbytes=int(document["nbytes"]),
        format=document["format"],
        tensors=tensors,
        socket=document.get("socket", ""),
        token=document.get("token", ""),
        handle=bytes.fromhex(document.get("ipc_handle", "")),
    )
    if not 0 <= description.nbytes <= description.size:
        raise ValueError("more bytes than the allocation has")
    for each in tensors:
        _check(each, description)
    if description.memory == "ipc" and len(description.handle) != cuda.IPC_HANDLE_SIZE:
        raise ValueError(f"a handle of {len(description.handle)} bytes")
    return description


def _check(tensor: Tensor, description: CopyDescription) -> None:
    """Check a tensor's place and size: a wrong one would let frameworks use foreign memory. Raises ValueError."""
    end = description.nbytes if tensor.nbytes else description.size  # an empty tensor may follow the last byte
    if not 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= end:
        raise ValueError(f"tensor {tensor.name!r} lies outside the allocation")
    bits = DTYPE_BITS.get(tensor.dtype)  # None: blocks of quantised weights
    if min(tensor.shape, default=0) < 0 or tensor.nbytes < 0:
        raise ValueError(f"tensor {tensor.name!r} has a negative size")
    if bits is not None and -(-math.prod(tensor.shape) * bits // 8) != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name!r} has {tensor.nbytes} bytes, which do not fit its type and shape")
