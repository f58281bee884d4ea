"""MXNet's arrays over mapped files. For MXNet 1.9, whose files of the usual kind are read in C."""

import ctypes
import itertools
import math
import mmap
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from mxnet.base import _LIB, NDArrayHandle, check_call
from mxnet.context import num_gpus
from mxnet.ndarray import NDArray

from trimsfs.client.native import library
from trimsfs.client.pages import address_of
from trimsfs.formats import DTYPE_BITS, BufferSource, Tensor, parse
from trimsfs.formats import mxnet as params

WITH_GRADIENT: dict[type, str] = {np.float16: "float16", np.float32: "float32", np.float64: "float64"}
"""The types that have gradients: their names by NumPy's class."""
RECORD = np.dtype(
    [
        *((name, np.uint64) for name in ("data", "nbytes", "shape", "name", "name_length")),
        ("dimensions", np.int32),
        *((name, np.uint8) for name in ("code", "bits")),
        ("unused", np.uint16),
    ]
)
"""An array to be made: where its bytes and its shape, of 64 bits a number, are in memory, and its type by DLPack's
number of a kind and bits; its name's offset in the file. Once it is made, only ``data`` and ``nbytes`` are of use. As
in ``_params.c``."""
Records = np.ndarray[Any, np.dtype[np.void]]

_KINDS = {
    "int8": (0, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "bool": (1, 1),
    "uint8": (1, 8),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
}
"""DLPack's number of the kind and bits of the types that MXNet takes over."""
_numbers = itertools.count(1)
_held: dict[int, mmap.mmap] = {}
"""Mappings that arrays are over. These may go when Python cannot be called any more, and so hold nothing of its."""
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_held))  # nor is anything unmapped when the interpreter clears its modules
_AT_ONCE = 64
_MOST = 1 << 16
_MOST_DIMENSIONS = 32
_GPU = 2


def read(mapping: mmap.mmap, name: str) -> tuple[list[Any], list[str] | None, Records] | None:
    """Arrays over a mapped file of MXNet's, their names if they have any, and where they are, as `RECORD`.

    None where MXNet would make other arrays of it. Raises FormatError, and MXNetError.
    """
    found = _scan(mapping)
    if found is not None:
        records, names = found
        return lend(mapping, records), names, records
    table = parse(BufferSource(memoryview(mapping)), name)
    usual = table.format == params.NAME and not _new(mapping, table.tensors)
    if not usual or not all(_possible(mapping, tensor) for tensor in table.tensors):
        return None
    if any("\0" in tensor.name for tensor in table.tensors):  # MXNet ends a name there
        return None
    arrays, records = over(mapping, table.tensors)
    return arrays, [tensor.name for tensor in table.tensors] if table.named and arrays else None, records


def _scan(mapping: mmap.mmap) -> tuple[Records, list[str] | None] | None:
    """What a file has that is of the usual kind; None of others, and of those that are wrong."""
    count = int.from_bytes(mapping[16:24], "little")
    if count > _MOST:
        return None
    records = np.zeros(count, RECORD)
    named = library().trimsfs_scan(address_of(mapping), len(mapping), _address(records), count)
    if named <= 0:
        return (records, None) if named == 0 else None
    places = zip(records["name"].tolist(), records["name_length"].tolist(), strict=True)
    try:
        names = [mapping[offset : offset + length].decode() for offset, length in places]
    except UnicodeDecodeError:
        return None
    return (records, names) if len(set(names)) == count else None


def _new(mapping: mmap.mmap, tensors: Sequence[Tensor]) -> bool:
    """Whether it was saved with NumPy's shapes, so that MXNet refuses to load it without them."""
    return bool(tensors) and struct.unpack_from("<I", mapping, params.FIRST_ARRAY) == (params.V3,)


def _possible(mapping: mmap.mmap, tensor: Tensor) -> bool:
    """Whether MXNet would make this array in the memory of the host."""
    if not fits(tensor):
        return False
    (device,) = struct.unpack_from("<i", mapping, tensor.offset - params.BEHIND_DEVICE)
    return bool(device != _GPU or num_gpus() == 0)


def fits(tensor: Tensor) -> bool:
    """Whether an array can lie where a tensor's bytes are in its file."""
    known = tensor.dtype in _KINDS and bool(tensor.nbytes) and 0 < len(tensor.shape) <= _MOST_DIMENSIONS
    return known and tensor.file is None and tensor.offset % (DTYPE_BITS[tensor.dtype] // 8) == 0


def over(mapping: mmap.mmap, tensors: Sequence[Tensor]) -> tuple[list[Any], Records]:
    """Arrays over parts of a mapping that fit, and where they are. Raises MXNetError."""
    records = np.zeros(len(tensors), RECORD)
    shapes = [np.array(tensor.shape, np.int64) for tensor in tensors]
    start = address_of(mapping) if tensors else 0
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        kind = _KINDS[tensor.dtype]
        place = (start + tensor.offset, tensor.nbytes, _address(shape))
        records[number] = (*place, 0, 0, len(shape), *kind, 0)
    arrays = lend(mapping, records)
    records["shape"] = 0  # they are no more
    return arrays, records


def lend(mapping: mmap.mmap, records: Records) -> list[Any]:
    """Arrays over a mapping, which lives as long as any of them, and then until `give_back`. Raises MXNetError."""
    give_back()
    handles = np.zeros(len(records), np.uint64)
    make = ctypes.cast(_LIB.MXNDArrayFromDLPackEx, ctypes.c_void_p)
    number = next(_numbers)
    _held[number] = mapping
    made = library().trimsfs_lend(_address(records), len(records), make, number, _address(handles))
    if made < 0:
        del _held[number]
        raise MemoryError
    arrays = [NDArray(NDArrayHandle(handle)) for handle in handles[:made].tolist()]
    if made < len(records):
        check_call(-1)
    return arrays


def give_back() -> bool:
    """Unmap what no array is over any more; whether there is anything else."""
    numbers = np.zeros(_AT_ONCE, np.uint64)
    told = _AT_ONCE
    while told == _AT_ONCE:
        told = library().trimsfs_unused(_address(numbers), _AT_ONCE)
        for number in numbers[:told].tolist():
            _held.pop(number, None)
    return bool(_held)


def zeros(dtype: str, shape: Sequence[int]) -> Any:
    """An array whose memory nobody has touched, as that is all zeros."""
    tensor = Tensor("", dtype, tuple(shape), 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)
    (array,), _ = over(mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE), [tensor])
    return array


def _address(array: Any) -> int:
    """Where a NumPy array of one dimension is; that of an empty one is none."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if len(array) else 0
