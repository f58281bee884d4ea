"""A tensor in a device's memory, which frameworks take without a copy by DLPack or the CUDA array interface."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from trimsfs.client.dtypes import NUMPY, check_whole_bytes, numpy_dtype
from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.client import dlpack
from trimsfs.extras.gpu.client.gpu_errors import GpuError
from trimsfs.extras.gpu.client.mapped_copy import MappedCopy
from trimsfs.formats import DTYPE_BITS, Tensor

if TYPE_CHECKING:
    import numpy as np


class DeviceTensor:
    """A dense tensor in C order: ``nbytes`` bytes at ``address`` of device ``device_ordinal`` of this process.

    Framework tensors made from it keep the memory alive. ``dtype`` is a key of DTYPE_BITS or, for blocks of quantised
    weights, GGUF's name; frameworks get such blocks as bytes.
    """

    __slots__ = ("_copy", "address", "device_ordinal", "dtype", "name", "nbytes", "shape")

    def __init__(self, tensor: Tensor, copy: MappedCopy) -> None:
        """Wrap *tensor* of a copy; its offset is in the copy's allocation."""
        self._copy = copy
        self.name = tensor.name
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.address = copy.address + tensor.offset
        self.nbytes = tensor.nbytes
        self.device_ordinal = copy.ordinal

    def __repr__(self) -> str:
        where = f"cuda:{self.device_ordinal}, {self.address:#x}"
        return f"DeviceTensor({self.name!r}, {self.dtype}, {list(self.shape)}, {where})"

    @property
    def read_only(self) -> bool:
        """Whether writes fault; otherwise they succeed, and every process sees them."""
        return self._copy.read_only

    def raw(self) -> Self:
        """The same bytes as a tensor of uint8 with one dimension."""
        offset = self.address - self._copy.address
        return type(self)(Tensor(self.name, "uint8", (self.nbytes,), offset, self.nbytes), self._copy)

    def plain(self) -> Self:
        """This tensor; for blocks of quantised weights, its bytes."""
        return self if self.dtype in DTYPE_BITS else self.raw()

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device_ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: Sequence[int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule. No *stream* needs to wait: the server leases only complete copies.

        Raises BufferError if the caller wants a copy, or another device.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"tensor {self.name!r} cannot be copied by DLPack: numpy() copies it to the host")
        versioned = max_version is not None and max_version[0] >= 1
        plain = self.plain()
        address = self.address if self.nbytes else 0
        device = self.__dlpack_device__()
        return dlpack.capsule(
            self._copy, address, plain.dtype, plain.shape, device, versioned=versioned, read_only=self.read_only
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3. Raises AttributeError for types that NumPy lacks; use `raw` for them."""
        plain = self.plain()
        if plain.dtype not in NUMPY:
            raise AttributeError(f"tensor {self.name!r} of {self.dtype}: NumPy has no such type; use raw()")
        return {
            "shape": plain.shape,
            "typestr": _typestr(plain.dtype),
            "data": (self.address if self.nbytes else 0, self.read_only),
            "strides": None,
            "stream": None,  # nothing to wait for
            "version": 3,
        }

    def __array__(self, *_: object, **__: object) -> "np.ndarray[Any, Any]":
        """Refuse conversion: NumPy would make an array of this one object. Raises TypeError."""
        raise TypeError(f"tensor {self.name!r} is in a device's memory: numpy() copies it to the host")

    def numpy(self) -> "np.ndarray[Any, Any]":
        """A copy in the host's memory. ml_dtypes adds types that NumPy lacks, such as bfloat16.

        Raises TypeError for types that both lack, and GpuError.
        """
        import numpy as np  # noqa: PLC0415 - the client itself needs no library

        plain = self.plain()
        dtype = numpy_dtype(plain.name, plain.dtype)
        check_whole_bytes(plain.name, plain.dtype)
        copied = np.empty(plain.shape, dtype)
        try:
            self._copy.read(copied.ctypes.data, self.address, self.nbytes)
        except cuda.CudaError as error:
            raise GpuError(f"tensor {self.name!r} cannot be read: {error}") from None
        return copied


def _typestr(dtype: str) -> str:
    kind = {"b": "b", "u": "u", "i": "i", "f": "f", "c": "c"}[dtype[0]]
    size = DTYPE_BITS[dtype] // 8
    return f"{'<' if size > 1 else '|'}{kind}{size}"
