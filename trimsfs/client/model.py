"""A model file, mapped copy-on-write: what is written to a tensor stays in this process, what is not is shared."""

import importlib
import mmap
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimsfs.client.places import bring
from trimsfs.formats import DTYPE_BITS, BufferSource, Tensor, TensorTable, parse

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor as TorchTensor

_NUMPY = frozenset(
    {
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)


class Model:
    """A model file and its tensors. Tensors keep the mapping, and so the file's generation, for as long as they live.

    Making one waits until the whole file is on this host.

    ``table`` tells the tensors' names, types, shapes and places, ``mapping`` is all of the file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.mapping = _map(self.path)
        self.table: TensorTable = parse(BufferSource(memoryview(self.mapping)), self.path.name)
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

    def _check_whole_bytes(self, tensor: Tensor) -> None:
        if DTYPE_BITS[tensor.dtype] % 8:
            raise TypeError(f"{self.path}: tensor {tensor.name!r} of {tensor.dtype}: elements share bytes; use raw()")

    def _buffer(self, tensor: Tensor) -> mmap.mmap | bytes:
        if tensor.file is None:
            return self.mapping
        mapping = self._others.get(tensor.file)
        if mapping is None:
            mapping = self._others[tensor.file] = _map(self.path.parent / tensor.file)
        return mapping


def _map(path: Path) -> mmap.mmap | bytes:
    """All of a file, once it is here: a store that fails is an OSError now, and no signal at a page's first use."""
    bring(path)
    with path.open("rb") as file:
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
