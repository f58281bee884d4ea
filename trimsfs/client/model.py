"""A model file, mapped copy-on-write: what is written to a tensor stays in this process, what is not is shared."""

import importlib
import io
import mmap
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimsfs.client.common import map_common
from trimsfs.client.folding import Foldable, Folded
from trimsfs.client.places import bring
from trimsfs.formats import DTYPE_BITS, BufferSource, FormatError, Tensor, TensorTable, parse

if TYPE_CHECKING:
    import numpy as np
    from jax import Array as JaxArray
    from mxnet.ndarray import NDArray
    from tensorflow import Tensor as TensorFlowTensor
    from torch import Tensor as TorchTensor

_NUMPY = frozenset(
    {
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)
_ALIGNMENT = 64
"""Bytes; addresses of memory that TensorFlow uses are multiples of it."""


class Model:
    """A model file and its tensors. Tensors keep the mapping, and so the file's generation, for as long as they live.

    Making one waits until the whole file is on this host.

    ``table`` tells the tensors' names, types, shapes and places, ``mapping`` is all of the file. ``inode`` is its
    inode's number.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).absolute()
        with open(path, "rb", buffering=0) as file:
            self.inode = os.fstat(file.fileno()).st_ino
            self.mapping = mapped(self.path, file, common=bool(bring(file)))
        try:
            self.table: TensorTable = parse(BufferSource(memoryview(self.mapping)), self.path.name)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None
        self._others: dict[str, mmap.mmap | bytes] = {}

    def raw(self, tensor: Tensor) -> memoryview:
        """The bytes of a tensor of the table, writable by this process alone."""
        view = memoryview(self._buffer(tensor))[tensor.offset : tensor.offset + tensor.nbytes]
        if len(view) != tensor.nbytes:
            raise EOFError(f"{self.path}: tensor {tensor.name!r}: {tensor.file} is too short")
        return view

    def numpy(self) -> "dict[str, np.ndarray[Any, Any]]":
        """All tensors as NumPy arrays, by name. Types that NumPy lacks, such as bfloat16, are those of ml_dtypes.

        Raises TypeError for types that neither has.
        """
        return {tensor.name: self._array(tensor) for tensor in self.table.tensors}

    def _array(self, tensor: Tensor) -> "np.ndarray[Any, Any]":
        import numpy as np  # noqa: PLC0415 - only where it is used: the client itself needs no library

        dtype = np.dtype(tensor.dtype if tensor.dtype in _NUMPY else _attribute(tensor, "ml_dtypes"))
        self._check_whole_bytes(tensor)
        return np.frombuffer(self.raw(tensor), dtype).reshape(tensor.shape)

    def torch(self) -> "dict[str, TorchTensor]":
        """All tensors as PyTorch tensors, by name. Raises TypeError for types that PyTorch lacks."""
        return {tensor.name: self._torch(tensor) for tensor in self.table.tensors}

    def _torch(self, tensor: Tensor) -> "TorchTensor":
        import torch  # noqa: PLC0415

        dtype = _attribute(tensor, "torch")
        self._check_whole_bytes(tensor)
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.frombuffer(self.raw(tensor), dtype=dtype).reshape(tensor.shape)

    def jax(self) -> "dict[str, JaxArray]":
        """All tensors as JAX arrays, by name, on JAX's default device. Raises TypeError for types that JAX lacks.

        On a CPU those at addresses that are multiples of 64 share the mapping, and change with a NumPy array of this
        model that is written to; others are copies. So are those of 64 bits an element, which JAX narrows to 32 unless
        ``jax_enable_x64`` is set.
        """
        import jax  # noqa: PLC0415

        return {name: jax.device_put(array, may_alias=True) for name, array in self.numpy().items()}

    def tensorflow(self) -> "dict[str, TensorFlowTensor]":
        """All tensors as TensorFlow tensors, by name, on the CPU. Raises TypeError for types that TensorFlow lacks.

        Those at addresses that are multiples of 64 share the mapping, and change with a NumPy array of this model that
        is written to; others are copies, and so are all 8-bit floats.
        """
        import tensorflow  # noqa: PLC0415

        with tensorflow.device("CPU"):
            return {name: _tensorflow(array) for name, array in self.numpy().items()}

    def mxnet(self) -> "dict[str, NDArray]":
        """All tensors as MXNet arrays, by name, on the CPU. Raises TypeError for types that MXNet lacks.

        They share the mapping: what MXNet writes to one shows in this model's arrays of other kinds.
        """
        adapter = importlib.import_module("trimsfs.client.mxnet")  # which imports this module
        arrays: dict[str, NDArray] = adapter.arrays(self)
        return arrays

    def fold(self) -> Folded:
        """Share what this process has written to the mapping with others of the same user that have written the same.

        Nobody may write to it meanwhile. Needs a mount, and Linux 6.7; raises OSError with an older one.
        """
        if isinstance(self.mapping, bytes):
            return Folded(shared=0, passed_on=0, own=0)
        return Foldable(self.path, self.inode, self.mapping).fold()

    def _check_whole_bytes(self, tensor: Tensor) -> None:
        if DTYPE_BITS[tensor.dtype] % 8:
            raise TypeError(f"{self.path}: tensor {tensor.name!r} of {tensor.dtype}: elements share bytes; use raw()")

    def _buffer(self, tensor: Tensor) -> mmap.mmap | bytes:
        if tensor.file is None:
            return self.mapping
        mapping = self._others.get(tensor.file)
        if mapping is None:
            with open(self.path.parent / tensor.file, "rb", buffering=0) as file:
                bring(file)
                mapping = self._others[tensor.file] = _map(file)
        return mapping


def mapped(path: Path, file: io.FileIO, *, common: bool) -> mmap.mmap | bytes:
    """All of an open file, which is here, what it has in *common* with another from that one. Raises OSError."""
    mapping = _map(file)
    if common and isinstance(mapping, mmap.mmap):
        map_common(path, os.fstat(file.fileno()).st_ino, mapping)
    return mapping


def _map(file: io.FileIO) -> mmap.mmap | bytes:
    """All of a file, which is here: a store that fails was an OSError, and is no signal at a page's first use."""
    if os.fstat(file.fileno()).st_size == 0:
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _attribute(tensor: Tensor, library: str) -> Any:
    """A library's type of a tensor's elements. Raises TypeError."""
    try:
        return getattr(importlib.import_module(library), tensor.dtype)
    except ImportError:
        raise TypeError(f"tensor {tensor.name!r} of {tensor.dtype} needs {library}: pip install {library}") from None
    except AttributeError:
        raise TypeError(f"tensor {tensor.name!r}: {library} has no type {tensor.dtype}; use raw()") from None


def _tensorflow(array: "np.ndarray[Any, Any]") -> "TensorFlowTensor":
    """A tensor over an array's bytes if it can be, else a copy. Raises TypeError."""
    import tensorflow  # noqa: PLC0415

    dtype = tensorflow.as_dtype(array.dtype)
    shared = tensorflow.experimental.dlpack.from_dlpack
    if array.ctypes.data % _ALIGNMENT:  # TensorFlow would take it, and end the process when it computes with it
        return tensorflow.constant(array)
    if array.dtype.name in _NUMPY:
        return shared(array.__dlpack__())
    if dtype == tensorflow.bfloat16:  # NumPy cannot lend it as what it is
        return tensorflow.bitcast(shared(array.view("uint16").__dlpack__()), dtype)
    return tensorflow.constant(array)
