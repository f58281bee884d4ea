"""A model's tensors in the types of frameworks, over its mapped bytes."""

import glob
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimsfs.client.dtypes import NUMPY, attribute, check_whole_bytes, numpy_dtype
from trimsfs.client.patterns import Patterns
from trimsfs.formats import Tensor, TensorTable

if TYPE_CHECKING:
    import numpy as np
    from jax import Array as JaxArray
    from tensorflow import Tensor as TensorFlowTensor
    from torch import Tensor as TorchTensor

_ALIGNMENT = 64
"""Bytes: TensorFlow needs memory at multiples of this."""


class Tensors(ABC):
    """The tensors of a model at ``path``, in one file or several.

    Methods return the tensors whose names match *tensors*, one `fnmatch` pattern or several; by default, all. They
    raise LookupError for a pattern that matches no name.
    """

    path: Path

    @property
    @abstractmethod
    def table(self) -> TensorTable:
        """Names, types, shapes and offsets of the tensors."""

    @abstractmethod
    def select(self, tensors: Patterns = None) -> Iterable[Tensor]:
        """The tensors of the table that match, in its order."""

    def raw(self, tensor: Tensor | str) -> memoryview:
        """The bytes of a tensor, by its name or its entry in the table; writes stay in this process.

        Raises LookupError for a name that no tensor has.
        """
        if isinstance(tensor, str):
            (tensor,) = self.select(glob.escape(tensor))
        elif not isinstance(tensor, Tensor):
            problem = f"{self.path}: {tensor!r} is no tensor"
            raise TypeError(f"{problem}: give a name, or an entry of model.table.tensors")
        return self._raw(tensor)

    @abstractmethod
    def _raw(self, tensor: Tensor) -> memoryview:
        """The bytes of a tensor of the table."""

    def numpy(self, tensors: Patterns = None) -> "dict[str, np.ndarray[Any, Any]]":
        """The tensors as NumPy arrays, by name; ml_dtypes adds types that NumPy lacks, such as bfloat16.

        Raises TypeError for types that both lack.
        """
        return {tensor.name: self._array(tensor) for tensor in self.select(tensors)}

    def _array(self, tensor: Tensor) -> "np.ndarray[Any, Any]":
        import numpy as np  # noqa: PLC0415 - the client itself needs no library

        dtype = numpy_dtype(tensor.name, tensor.dtype)
        check_whole_bytes(tensor.name, tensor.dtype)
        return np.frombuffer(self._raw(tensor), dtype).reshape(tensor.shape)

    def torch(self, tensors: Patterns = None) -> "dict[str, TorchTensor]":
        """The tensors as PyTorch tensors, by name. Raises TypeError for types that PyTorch lacks."""
        return {tensor.name: self._torch(tensor) for tensor in self.select(tensors)}

    def _torch(self, tensor: Tensor) -> "TorchTensor":
        import torch  # noqa: PLC0415

        dtype = attribute(tensor.name, tensor.dtype, "torch")
        check_whole_bytes(tensor.name, tensor.dtype)
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.frombuffer(self._raw(tensor), dtype=dtype).reshape(tensor.shape)

    def state_dict(self, tensors: Patterns = None) -> "dict[str, TorchTensor]":
        """Same as `torch`: ``module.load_state_dict(model.state_dict(), assign=True)`` copies nothing."""
        return self.torch(tensors)

    def jax(self, tensors: Patterns = None) -> "dict[str, JaxArray]":
        """The tensors as JAX arrays, by name, on JAX's default device. Raises TypeError for types that JAX lacks.

        On a CPU, tensors at multiples of 64 bytes share the mapping, and see writes through this model's NumPy arrays.
        JAX copies the others. It also copies 64-bit elements, which it narrows to 32 bits unless ``jax_enable_x64`` is
        set.
        """
        import jax  # noqa: PLC0415

        return {name: jax.device_put(array, may_alias=True) for name, array in self.numpy(tensors).items()}

    def tensorflow(self, tensors: Patterns = None) -> "dict[str, TensorFlowTensor]":
        """The tensors as TensorFlow tensors, by name, on the CPU. Raises TypeError for types that TensorFlow lacks.

        Tensors at multiples of 64 bytes share the mapping, and see writes through this model's NumPy arrays. TensorFlow
        copies the others, and all 8-bit floats.
        """
        import tensorflow  # noqa: PLC0415

        with tensorflow.device("CPU"):
            return {name: _tensorflow(array) for name, array in self.numpy(tensors).items()}


def _tensorflow(array: "np.ndarray[Any, Any]") -> "TensorFlowTensor":
    """A tensor over an array's bytes where TensorFlow can share them, else a copy. Raises TypeError."""
    import tensorflow  # noqa: PLC0415

    dtype = tensorflow.as_dtype(array.dtype)
    shared = tensorflow.experimental.dlpack.from_dlpack
    if array.ctypes.data % _ALIGNMENT:  # TensorFlow would accept it, then crash when it computes
        return tensorflow.constant(array)
    if array.dtype.name in NUMPY:
        return shared(array.__dlpack__())
    if dtype == tensorflow.bfloat16:  # NumPy cannot export bfloat16 by DLPack
        return tensorflow.bitcast(shared(array.view("uint16").__dlpack__()), dtype)
    return tensorflow.constant(array)
