"""Makes MXNet's arrays over mapped files. Written for MXNet 1.9; the native library parses the usual ``.params``."""

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
"""An array to make, as in ``_params.c``. ``data`` and ``shape`` (int64) are addresses, ``code`` and ``bits`` DLPack's
type, ``name`` an offset in the file. Once arrays are made, only ``data`` and ``nbytes`` are valid."""
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
"""DLPack's code and bits of the types that MXNet accepts."""
_numbers = itertools.count(1)
_held: dict[int, mmap.mmap] = {}
"""The mappings under arrays. MXNet may free an array after the interpreter has ended, so arrays hold no reference."""
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_held))  # the interpreter must not unmap them when it clears its modules
_AT_ONCE = 64
_MOST = 1 << 16
_MOST_DIMENSIONS = 32
_GPU = 2


def read(mapping: mmap.mmap, name: str) -> tuple[list[Any], list[str] | None, Records] | None:
    """The arrays of a mapped ``.params`` file, their names if they have any, and their records.

    None if MXNet itself would make different arrays. Raises FormatError, and MXNetError.
    """
    scanned = _scan(mapping)
    if scanned is not None:
        records, names = scanned
        return make_arrays(mapping, records), names, records
    table = parse(BufferSource(memoryview(mapping)), name)
    usual = table.format == params.NAME and not _new(mapping, table.tensors)
    if not usual or not all(_possible(mapping, tensor) for tensor in table.tensors):
        return None
    if any("\0" in tensor.name for tensor in table.tensors):  # MXNet ends the name there
        return None
    arrays, records = over(mapping, table.tensors)
    return arrays, [tensor.name for tensor in table.tensors] if table.named and arrays else None, records


def _scan(mapping: mmap.mmap) -> tuple[Records, list[str] | None] | None:
    """The records and names of a file in the usual layout; None for others, and for malformed files."""
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
    """Whether the file was saved with NumPy shapes: without them, MXNet refuses to load it."""
    return bool(tensors) and struct.unpack_from("<I", mapping, params.FIRST_ARRAY) == (params.V3,)


def _possible(mapping: mmap.mmap, tensor: Tensor) -> bool:
    """Whether MXNet would make this array in the host's memory."""
    if not fits(tensor):
        return False
    (device,) = struct.unpack_from("<i", mapping, tensor.offset - params.BEHIND_DEVICE)
    return bool(device != _GPU or num_gpus() == 0)


def fits(tensor: Tensor) -> bool:
    """Whether an array can lie over a tensor's bytes: type, shape and alignment suit MXNet."""
    known = tensor.dtype in _KINDS and bool(tensor.nbytes) and 0 < len(tensor.shape) <= _MOST_DIMENSIONS
    return known and tensor.file is None and tensor.offset % (DTYPE_BITS[tensor.dtype] // 8) == 0


def over(mapping: mmap.mmap, tensors: Sequence[Tensor]) -> tuple[list[Any], Records]:
    """Make arrays over tensors of a mapping that all `fits`; returns them and their records. Raises MXNetError."""
    records = np.zeros(len(tensors), RECORD)
    shapes = [np.array(tensor.shape, np.int64) for tensor in tensors]
    start = address_of(mapping) if tensors else 0
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        kind = _KINDS[tensor.dtype]
        place = (start + tensor.offset, tensor.nbytes, _address(shape))
        records[number] = (*place, 0, 0, len(shape), *kind, 0)
    arrays = make_arrays(mapping, records)
    records["shape"] = 0  # the shapes are freed now
    return arrays, records


def make_arrays(mapping: mmap.mmap, records: Records) -> list[Any]:
    """Make arrays over a mapping, which stays mapped while any of them lives, and then until `unmap_unused`.

    Raises MXNetError.
    """
    unmap_unused()
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


def unmap_unused() -> bool:
    """Unmap the mappings under which no array is left; returns whether any mapping is left."""
    numbers = np.zeros(_AT_ONCE, np.uint64)
    count = _AT_ONCE
    while count == _AT_ONCE:
        count = library().trimsfs_unused(_address(numbers), _AT_ONCE)
        for number in numbers[:count].tolist():
            _held.pop(number, None)
    return bool(_held)


def zeros(dtype: str, shape: Sequence[int]) -> Any:
    """An array of zeros over untouched anonymous memory."""
    tensor = Tensor("", dtype, tuple(shape), 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)
    (array,), _ = over(mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE), [tensor])
    return array


def _address(array: Any) -> int:
    """The address of a NumPy array of one dimension; 0 for an empty one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if len(array) else 0
