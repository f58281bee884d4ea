"""Parses MXNet's ``.params``: consecutive NDArrays, each with a header, then their names.

By MXNet 1.9, ``src/ndarray/ndarray.cc``: ``NDArray::Save``, ``NDArray::LegacyLoad``. Sparse arrays are not supported.
"""

from trimsfs.formats.source import HEADER_LIMIT, Cursor, Source
from trimsfs.formats.table import FormatError, Tensor, TensorTable, dense, table

NAME = "mxnet"
MAGIC = (0x112).to_bytes(8, "little")
_V1, _V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DENSE = 0
FIRST_ARRAY = 24
"""Offset of the first array."""
BEHIND_DEVICE = 12
"""Bytes from the device type in an array's header to the array's data."""
_MOST_DIMENSIONS = 32
_LEAST_ENTRY = 8
"""Bytes of the shortest array."""
_DTYPES = (
    "float32",
    "float64",
    "float16",
    "uint8",
    "int32",
    "int8",
    "int64",
    "bool",
    "int16",
    "uint16",
    "uint32",
    "uint64",
    "bfloat16",
)


def parse(source: Source) -> TensorTable:
    """The table of a ``.params`` file. Arrays without names get their numbers as names.

    Raises FormatError, and OSError from the source.
    """
    cursor = Cursor(source)
    if bytes(cursor.take(8)) != MAGIC:
        raise FormatError("not a list of NDArrays: wrong magic")
    _, count = cursor.unpack("QQ")
    if count > min(source.size, HEADER_LIMIT) // _LEAST_ENTRY:
        raise FormatError(f"the file is too small for {count} arrays")
    arrays = [_array(cursor, number) for number in range(count)]
    named = cursor.number("Q")
    if named not in {0, count}:
        raise FormatError(f"{named} names for {count} arrays")
    names = [cursor.text(cursor.number("Q")) for _ in range(named)] or [str(number) for number in range(count)]
    tensors = (array._replace(name=name) for name, array in zip(names, arrays, strict=True))
    return table(NAME, tensors, source.size, named=named > 0 or count == 0)


def _array(cursor: Cursor, number: int) -> Tensor:
    begin = cursor.offset
    magic, storage, dimensions = cursor.unpack("Iii")  # even the shortest array has as many bytes
    if magic in {_V2, V3}:
        if storage != _DENSE:
            raise FormatError(f"array {number} is sparse (storage type {storage})")
        # Before V3, zero dimensions meant an empty array; since V3, -1 does.
        nothing, size = dimensions == (0 if magic == _V2 else -1), "q"
    else:  # the oldest format has the number of dimensions in place of the magic
        dimensions, size, header = (storage, "q", 8) if magic == _V1 else (magic, "I", 4)
        nothing = dimensions == 0
        cursor.offset = begin + header
    if nothing:
        raise FormatError(f"array {number} is empty")
    if not 0 <= dimensions <= _MOST_DIMENSIONS:
        raise FormatError(f"{dimensions} dimensions at {begin} are out of range")
    *shape, _, _, kind = cursor.unpack(f"{dimensions}{size}iii")  # skips the device, two numbers
    if not 0 <= kind < len(_DTYPES):
        raise FormatError(f"array {number}: unknown dtype {kind}")
    tensor = dense(str(number), _DTYPES[kind], shape, cursor.offset)
    cursor.skip(tensor.nbytes)
    return tensor
