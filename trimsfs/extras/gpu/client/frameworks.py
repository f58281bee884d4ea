"""Converts tensors in a device's memory to those of frameworks, without a copy.

Each result keeps the memory alive. Each function raises TypeError for a type that the framework lacks. Blocks of
quantised weights become bytes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trimsfs.client.dtypes import attribute, check_whole_bytes, numpy_dtype
from trimsfs.extras.gpu.client.device_tensor import DeviceTensor

_MXNET = {"uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"}
"""The types that MXNet 1.9 accepts by DLPack."""

if TYPE_CHECKING:
    from cupy import ndarray as CupyArray  # noqa: N812 - named as the others
    from jax import Array as JaxArray
    from mxnet.ndarray import NDArray
    from numba.cuda.cudadrv.devicearray import DeviceNDArray as NumbaArray
    from torch import Tensor as TorchTensor


def torch(tensor: DeviceTensor) -> "TorchTensor":
    """A PyTorch tensor, passed as bytes: DLPack has codes for 8-bit floats only since version 1.1."""
    import torch as library  # noqa: PLC0415 - the client itself needs no framework

    tensor = tensor.plain()
    dtype = attribute(tensor.name, tensor.dtype, "torch")
    check_whole_bytes(tensor.name, tensor.dtype)
    if not tensor.nbytes:
        return library.empty(tensor.shape, dtype=dtype, device=f"cuda:{tensor.device_ordinal}")
    return library.from_dlpack(tensor.raw()).view(dtype).reshape(tensor.shape)


def cupy(tensor: DeviceTensor) -> "CupyArray":
    """A CuPy array."""
    import cupy as library  # noqa: PLC0415

    tensor = tensor.plain()
    dtype = numpy_dtype(tensor.name, tensor.dtype)
    check_whole_bytes(tensor.name, tensor.dtype)
    if not tensor.nbytes:
        with library.cuda.Device(tensor.device_ordinal):
            return library.empty(tensor.shape, dtype)
    memory = library.cuda.UnownedMemory(tensor.address, tensor.nbytes, tensor, tensor.device_ordinal)
    return library.ndarray(tensor.shape, dtype, library.cuda.MemoryPointer(memory, 0))


def jax(tensor: DeviceTensor) -> "JaxArray":
    """A JAX array. JAX narrows types of 64 bits to 32, which copies, unless ``jax_enable_x64`` is set."""
    import jax.dlpack  # noqa: PLC0415

    tensor = tensor.plain()
    check_whole_bytes(tensor.name, tensor.dtype)
    return jax.dlpack.from_dlpack(tensor)


def numba(tensor: DeviceTensor) -> "NumbaArray":
    """An array for kernels of Numba."""
    tensor = tensor.plain()
    if not hasattr(tensor, "__cuda_array_interface__"):
        raise TypeError(f"tensor {tensor.name!r}: numba has no type {tensor.dtype}; use raw()")
    library: Any = importlib.import_module("numba.cuda")
    return library.as_cuda_array(tensor, sync=False)


def mxnet(tensor: DeviceTensor) -> "NDArray":
    """An MXNet array."""
    import mxnet as library  # noqa: PLC0415

    tensor = tensor.plain()
    if tensor.dtype not in _MXNET:
        raise TypeError(f"tensor {tensor.name!r}: mxnet has no type {tensor.dtype}; use raw()")
    return library.nd.from_dlpack(tensor.__dlpack__())
