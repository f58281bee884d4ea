"""MXNet's ``.params``: NDArrays one after the other, each with a header, then their names.

By MXNet 1.9, ``src/ndarray/ndarray.cc``: ``NDArray::Save``, ``NDArray::LegacyLoad``. Sparse arrays are not mapped.
"""

from trimsfs.formats.source import HEADER_LIMIT, Cursor, Source
from trimsfs.formats.table import FormatError, Tensor, TensorTable, dense, table

NAME = "mxnet"
MAGIC = (0x112).to_bytes(8, "little")
_V1, _V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DENSE = 0
FIRST_ARRAY = 24
"""Where the first array begins, if there is any."""
BEHIND_DEVICE = 12
"""Bytes from where an array's header tells the type of device that it was on to the array's own."""
_MOST_DIMENSIONS = 32
_LEAST_ENTRY = 8
"""Bytes that the shortest array takes."""
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
    """The table of a ``.params`` file. Arrays without names are called by their numbers.

    Raises FormatError, and OSError from the source.
    """
    cursor = Cursor(source)
    if bytes(cursor.take(8)) != MAGIC:
        raise FormatError("it does not begin as a list of NDArrays")
    _, count = cursor.unpack("QQ")
    if count > min(source.size, HEADER_LIMIT) // _LEAST_ENTRY:
        raise FormatError(f"{count} arrays are more than it has room for")
    arrays = [_array(cursor, number) for number in range(count)]
    named = cursor.number("Q")
    if named not in {0, count}:
        raise FormatError(f"{named} names for {count} arrays")
    names = [cursor.text(cursor.number("Q")) for _ in range(named)] or [str(number) for number in range(count)]
    tensors = (array._replace(name=name) for name, array in zip(names, arrays, strict=True))
    return table(NAME, tensors, source.size, named=named > 0 or count == 0)


def _array(cursor: Cursor, number: int) -> Tensor:
    begin = cursor.offset
    magic, storage, dimensions = cursor.unpack("Iii")  # no array is shorter
    if magic in {_V2, V3}:
        if storage != _DENSE:
            raise FormatError(f"array {number} is sparse (storage type {storage})")
        # Before there were shapes of none, a shape of no dimensions meant that there is no array.
        nothing, size = dimensions == (0 if magic == _V2 else -1), "q"
    else:  # the oldest have no magic: it is the number of dimensions
        dimensions, size, header = (storage, "q", 8) if magic == _V1 else (magic, "I", 4)
        nothing = dimensions == 0
        cursor.offset = begin + header
    if nothing:
        raise FormatError(f"array {number} is empty")
    if not 0 <= dimensions <= _MOST_DIMENSIONS:
        raise FormatError(f"{dimensions} dimensions at {begin}")
    *shape, _, _, kind = cursor.unpack(f"{dimensions}{size}iii")  # the device that it was on is between
    if not 0 <= kind < len(_DTYPES):
        raise FormatError(f"array {number}: unknown dtype {kind}")
    tensor = dense(str(number), _DTYPES[kind], shape, cursor.offset)
    cursor.skip(tensor.nbytes)
    return tensor
