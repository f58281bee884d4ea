"""A model in a device's memory: the server loads one copy, and every process maps it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from trimsfs.extras.gpu.client import frameworks
from trimsfs.extras.gpu.client.device_tensor import DeviceTensor
from trimsfs.extras.gpu.client.gpu_errors import GpuError
from trimsfs.extras.gpu.client.mapped_copy import MappedCopy
from trimsfs.formats import Tensor

if TYPE_CHECKING:
    import numpy as np
    from cupy import ndarray as CupyArray  # noqa: N812 - named as the others
    from jax import Array as JaxArray
    from mxnet.ndarray import NDArray
    from numba.cuda.cudadrv.devicearray import DeviceNDArray as NumbaArray
    from torch import Tensor as TorchTensor

T = TypeVar("T")


class DeviceModel:
    """A model, or parts of it, in a device's memory. Tensors keep the memory and its lease alive.

    ``tensors`` maps names to tensors; it is empty for a file of unknown format, which has only an `image`. ``device``
    is the device's UUID, ``ordinal`` its number in this process, ``generation`` the file's generation, and ``format``
    the name of its format or None. For a sharded model, ``generation`` joins those of its files by commas.
    """

    def __init__(self, path: Path, copies: Sequence[MappedCopy]) -> None:
        """Join *copies*: parts of one file or of several, each file in one generation."""
        self.path = path
        self._copies = tuple(copies)
        first = copies[0]
        self.device = first.description.device
        self.ordinal = first.ordinal
        self.generation = ",".join(dict.fromkeys(copy.description.generation for copy in copies))
        self.format = first.description.format
        self.tensors: dict[str, DeviceTensor] = {}
        for copy in copies:
            for tensor in copy.description.tensors:
                self.tensors.setdefault(tensor.name, DeviceTensor(tensor, copy))

    @classmethod
    def joined(cls, path: Path, shards: Iterable[tuple[Self, Collection[str]]]) -> Self:
        """Join the models of several files on one device, with the named tensors of each."""
        parts = list(shards)
        model = cls(path, [copy for part, _ in parts for copy in part._copies])
        model.tensors = {
            name: tensor for part, names in parts for name, tensor in part.tensors.items() if name in names
        }
        return model

    def __repr__(self) -> str:
        return f"DeviceModel({str(self.path)!r}, {len(self.tensors)} tensors, {self.device})"

    @property
    def image(self) -> DeviceTensor:
        """The whole copy as bytes; for a file of unknown format, the file. Raises GpuError for several copies.

        If the server serves a part from a loaded copy of the whole file, the image is that copy.
        """
        if len(self._copies) > 1:
            raise GpuError(
                f"{self.path}: it has {len(self._copies)} copies, and each has an image of its own: "
                "open one file, by one pattern"
            )
        (copy,) = self._copies
        return DeviceTensor(Tensor("", "uint8", (copy.description.nbytes,), 0, copy.description.nbytes), copy)

    def check(self) -> None:
        """Check that memory and lease still exist. Raises GpuLostError otherwise: load the model again then."""
        for copy in self._copies:
            copy.lease.check()

    def torch(self) -> "dict[str, TorchTensor]":
        """All tensors as PyTorch tensors, by name. Raises TypeError for types that PyTorch lacks."""
        return self._all(frameworks.torch)

    def cupy(self) -> "dict[str, CupyArray]":
        """All tensors as CuPy arrays, by name. Raises TypeError for types that CuPy lacks."""
        return self._all(frameworks.cupy)

    def jax(self) -> "dict[str, JaxArray]":
        """All tensors as JAX arrays, by name. Raises TypeError for types of less than a byte, and JAX's errors."""
        return self._all(frameworks.jax)

    def numba(self) -> "dict[str, NumbaArray]":
        """All tensors as arrays for Numba's kernels, by name. Raises TypeError for types that NumPy lacks."""
        return self._all(frameworks.numba)

    def mxnet(self) -> "dict[str, NDArray]":
        """All tensors as MXNet arrays, by name. Raises TypeError for types that MXNet lacks."""
        return self._all(frameworks.mxnet)

    def numpy(self) -> "dict[str, np.ndarray[Any, Any]]":
        """Copies of all tensors in this process's memory, by name. Raises as `DeviceTensor.numpy`."""
        return self._all(DeviceTensor.numpy)

    def _all(self, function: Callable[[DeviceTensor], T]) -> dict[str, T]:
        return {name: function(tensor) for name, tensor in self.tensors.items()}
