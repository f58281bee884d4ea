"""A model file, mapped copy-on-write: pages that a process writes to become its own, all others stay shared."""

import mmap
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimsfs.client.dtypes import NUMPY, attribute, check_whole_bytes, numpy_dtype
from trimsfs.client.file_state import ensure_local
from trimsfs.client.folding import Foldable, Folded
from trimsfs.client.mapping import map_file, mapped
from trimsfs.formats import BufferSource, FormatError, Tensor, TensorTable, parse

if TYPE_CHECKING:
    import numpy as np
    from jax import Array as JaxArray
    from mxnet.ndarray import NDArray
    from tensorflow import Tensor as TensorFlowTensor
    from torch import Tensor as TorchTensor

    from trimsfs.client.gpu import DeviceModel

_ALIGNMENT = 64
"""Bytes; addresses of memory that TensorFlow uses are multiples of it."""


class Model:
    """A model file and its tensors. Tensors keep the mapping, and so the file's generation, while they live.

    The constructor opens the file. The first use of its content maps it, after waiting until all of it is on this host.
    ``inode`` is its inode number.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the model
        self.inode = os.fstat(self._file.fileno()).st_ino
        # Computed on first use. Without a lock, which a forked child could find held: the first result counts.
        self._made: dict[str, Any] = {}
        self._others: dict[str, mmap.mmap | bytes] = {}

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    @property
    def mapping(self) -> mmap.mmap | bytes:
        """The whole file. Raises OSError, as when the store fails."""
        made: mmap.mmap | bytes | None = self._made.get("mapping")
        if made is None:
            mapping = mapped(self.path, self._file, common=bool(ensure_local(self._file)))
            made = self._made.setdefault("mapping", mapping)
        return made

    @property
    def table(self) -> TensorTable:
        """Names, types, shapes and offsets of the tensors. Raises FormatError, and OSError as `mapping`."""
        made: TensorTable | None = self._made.get("table")
        if made is None:
            try:
                table = parse(BufferSource(memoryview(self.mapping)), self.path.name)
            except FormatError as error:
                raise FormatError(f"{self.path}: {error}") from None
            made = self._made.setdefault("table", table)
        return made

    def to(
        self, device: str | int, tensors: str | Iterable[str] | None = None, memory: Literal["vmm", "ipc"] = "vmm"
    ) -> "DeviceModel":
        """Lease the copy in a device's memory that all processes share, or a part of it. Needs a mount with a GPU tier.

        *device* is ``"cuda:1"`` or ``1`` by the ordinal in this process, ``"GPU-…"`` by UUID, or ``"cuda"`` for the
        first. *tensors* is one pattern of `fnmatch` or several; the server loads only the tensors that match.
        *memory* is ``"vmm"``, which this process can only read, or ``"ipc"``, which every holder can write to and which
        ends with the server.

        Waits until the copy is loaded. The file may be of any format, and is not mapped in this process. Raises
        GpuError.
        """
        from trimsfs.client.gpu import load  # noqa: PLC0415 - most programs use no GPU

        return load(self.path, self._file, device, tensors, memory)

    def raw(self, tensor: Tensor) -> memoryview:
        """The bytes of a tensor of the table; writes stay in this process."""
        view = memoryview(self._buffer(tensor))[tensor.offset : tensor.offset + tensor.nbytes]
        if len(view) != tensor.nbytes:
            raise EOFError(f"{self.path}: tensor {tensor.name!r}: {tensor.file} is too short")
        return view

    def numpy(self) -> "dict[str, np.ndarray[Any, Any]]":
        """All tensors as NumPy arrays, by name; types that NumPy lacks, such as bfloat16, come from ml_dtypes.

        Raises TypeError for types that both lack.
        """
        return {tensor.name: self._array(tensor) for tensor in self.table.tensors}

    def _array(self, tensor: Tensor) -> "np.ndarray[Any, Any]":
        import numpy as np  # noqa: PLC0415 - the client itself needs no library

        dtype = numpy_dtype(tensor.name, tensor.dtype)
        check_whole_bytes(tensor.name, tensor.dtype)
        return np.frombuffer(self.raw(tensor), dtype).reshape(tensor.shape)

    def torch(self) -> "dict[str, TorchTensor]":
        """All tensors as PyTorch tensors, by name. Raises TypeError for types that PyTorch lacks."""
        return {tensor.name: self._torch(tensor) for tensor in self.table.tensors}

    def _torch(self, tensor: Tensor) -> "TorchTensor":
        import torch  # noqa: PLC0415

        dtype = attribute(tensor.name, tensor.dtype, "torch")
        check_whole_bytes(tensor.name, tensor.dtype)
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)
        return torch.frombuffer(self.raw(tensor), dtype=dtype).reshape(tensor.shape)

    def jax(self) -> "dict[str, JaxArray]":
        """All tensors as JAX arrays, by name, on JAX's default device. Raises TypeError for types that JAX lacks.

        On a CPU, tensors at addresses that are multiples of 64 share the mapping: writes through a NumPy array of this
        model show in them. Other tensors are copied. JAX also copies elements of 64 bits, which it narrows to 32 unless
        ``jax_enable_x64`` is set.
        """
        import jax  # noqa: PLC0415

        return {name: jax.device_put(array, may_alias=True) for name, array in self.numpy().items()}

    def tensorflow(self) -> "dict[str, TensorFlowTensor]":
        """All tensors as TensorFlow tensors, by name, on the CPU. Raises TypeError for types that TensorFlow lacks.

        Tensors at addresses that are multiples of 64 share the mapping: writes through a NumPy array of this model show
        in them. Other tensors are copied, and so are all 8-bit floats.
        """
        import tensorflow  # noqa: PLC0415

        with tensorflow.device("CPU"):
            return {name: _tensorflow(array) for name, array in self.numpy().items()}

    def mxnet(self) -> "dict[str, NDArray]":
        """All tensors as MXNet arrays, by name, on the CPU. Raises TypeError for types that MXNet lacks.

        They share the mapping: what MXNet writes shows in this model's tensors of other frameworks.
        """
        from trimsfs.client.mxnet.load import arrays  # noqa: PLC0415

        try:
            return arrays(self.table, self.mapping)
        except TypeError as error:
            raise TypeError(f"{self.path}: {error}") from None

    def fold(self) -> Folded:
        """Share the pages that this process wrote with processes of the same user that wrote the same bytes.

        No thread may write to the mapping meanwhile. Needs a mount, and Linux 6.7; raises OSError before that.
        """
        if isinstance(self.mapping, bytes):
            return Folded(shared=0, passed_on=0, own=0)
        return Foldable(self.path, self.inode, self.mapping).fold()

    def _buffer(self, tensor: Tensor) -> mmap.mmap | bytes:
        if tensor.file is None:
            return self.mapping
        mapping = self._others.get(tensor.file)
        if mapping is None:
            with open(self.path.parent / tensor.file, "rb", buffering=0) as file:
                ensure_local(file)
                mapping = self._others[tensor.file] = map_file(file)
        return mapping


def _tensorflow(array: "np.ndarray[Any, Any]") -> "TensorFlowTensor":
    """A tensor over an array's bytes where TensorFlow can share them, else a copy. Raises TypeError."""
    import tensorflow  # noqa: PLC0415

    dtype = tensorflow.as_dtype(array.dtype)
    shared = tensorflow.experimental.dlpack.from_dlpack
    if array.ctypes.data % _ALIGNMENT:  # TensorFlow accepts it, and crashes when it computes with it
        return tensorflow.constant(array)
    if array.dtype.name in NUMPY:
        return shared(array.__dlpack__())
    if dtype == tensorflow.bfloat16:  # NumPy cannot export bfloat16 by DLPack
        return tensorflow.bitcast(shared(array.view("uint16").__dlpack__()), dtype)
    return tensorflow.constant(array)
