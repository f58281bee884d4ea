"""Parses ONNX: initializers, in the file or in files beside it.

By https://github.com/onnx/onnx, ``onnx.proto3``, of which it decodes only a few fields. It lists only initializers that
are stored as raw bytes.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from trimsfs.formats.source import Cursor, Source
from trimsfs.formats.table import FormatError, Tensor, TensorTable, dense, table

NAME = "onnx"
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL_DATA, _LOCATION = 1, 2, 8, 9, 13, 14
_KEY, _VALUE = 1, 2
_EXTERNAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_DIMENSIONS = 64
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1fn",
    24: "float8_e8m0fnu",
}


def parse(source: Source) -> TensorTable:
    """The table of a model's initializers that are raw bytes. Raises FormatError, and OSError from the source."""
    cursor = Cursor(source)
    graphs = [span for number, span in _fields(cursor, source.size) if number == _GRAPH and isinstance(span, range)]
    if len(graphs) != 1:
        raise FormatError("not an ONNX model: it has no graph, or several")
    tensors: list[Tensor] = []
    cursor = cursor.at(graphs[0].start)
    for number, span in _fields(cursor, graphs[0].stop, entered=_INITIALIZER):
        if number == _INITIALIZER and isinstance(span, range):
            tensor = _tensor(cursor, span)
            if tensor is not None:
                tensors.append(tensor)
    return table(NAME, tensors, source.size)


def _fields(cursor: Cursor, stop: int, entered: int | None = None) -> Iterator[tuple[int, int | range]]:
    """The numbers and values of the fields up to *stop*; for fields of bytes, their offsets instead.

    The cursor skips each field but those with the number *entered*, which the caller must skip.
    """
    while cursor.offset < stop:
        key = _varint(cursor)
        number, kind = key >> 3, key & 7
        value: int | range = 0
        if kind == _VARINT:
            value = _varint(cursor)
        elif kind == _BYTES:
            length = _varint(cursor)
            value = range(cursor.offset, cursor.offset + length)
            if value.stop > stop:
                raise FormatError(f"field {number} at {value.start} exceeds its message")
            if number != entered:
                cursor.skip(length)
        elif kind in {_FIXED64, _FIXED32}:
            cursor.skip(8 if kind == _FIXED64 else 4)
        else:
            raise FormatError(f"field {number} at {cursor.offset} has unknown wire type {kind}")
        yield number, value
    if cursor.offset > stop:
        raise FormatError(f"a field exceeds the message that ends at {stop}")


def _varint(cursor: Cursor) -> int:
    value = 0
    for position in range(10):
        byte = cursor.take(1)[0]
        value |= (byte & 0x7F) << 7 * position
        if not byte & 0x80:
            return value
    raise FormatError(f"the varint at {cursor.offset} is too long")


def _tensor(cursor: Cursor, span: range) -> Tensor | None:
    """The tensor of a TensorProto, which the cursor skips; None when its bytes are not raw."""
    name, dtype, location = "", 0, 0
    shape: list[int] = []
    raw: range | None = None
    external: dict[str, str] = {}
    for number, value in _fields(cursor, span.stop):
        if number == _DIMS:
            shape += [value] if isinstance(value, int) else _packed(cursor.at(value.start), value.stop)
            if len(shape) > _MOST_DIMENSIONS:
                raise FormatError(f"tensor at {span.start}: too many dimensions")
        elif isinstance(value, int):
            dtype = value if number == _DATA_TYPE else dtype
            location = value if number == _LOCATION else location
        elif number == _NAME:
            name = cursor.at(value.start).text(len(value))
        elif number == _RAW_DATA:
            raw = value
        elif number == _EXTERNAL_DATA:
            external |= [_entry(cursor.at(value.start), value.stop)]
    if location == _EXTERNAL:
        return _external(name, _DTYPES.get(dtype, str(dtype)), shape, external)
    if raw is None:
        return None
    tensor = dense(name, _DTYPES.get(dtype, str(dtype)), shape, raw.start)
    if tensor.nbytes != len(raw):
        raise FormatError(f"tensor {name!r}: {len(raw)} bytes where its shape needs {tensor.nbytes}")
    return tensor


def _external(name: str, dtype: str, shape: list[int], entries: dict[str, str]) -> Tensor:
    """A tensor whose bytes lie in another file."""
    location = PurePosixPath(entries.get("location", ""))
    if not location.parts or location.is_absolute() or ".." in location.parts:
        raise FormatError(f"tensor {name!r} is in {str(location)!r}, which is not a path below the model")
    tensor = dense(name, dtype, shape, _number(name, entries.get("offset", "0")), file=str(location))
    if "length" in entries and _number(name, entries["length"]) != tensor.nbytes:
        raise FormatError(f"tensor {name!r}: {entries['length']} bytes where its shape needs {tensor.nbytes}")
    return tensor


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 19:
        raise FormatError(f"tensor {name!r}: {text[:32]!r} is not a size in bytes")
    return int(text)


def _entry(cursor: Cursor, stop: int) -> tuple[str, str]:
    """The key and value of a StringStringEntryProto."""
    texts = {_KEY: "", _VALUE: ""}
    for number, value in _fields(cursor, stop):
        if number in texts and isinstance(value, range):
            texts[number] = cursor.at(value.start).text(len(value))
    return texts[_KEY], texts[_VALUE]


def _packed(cursor: Cursor, stop: int) -> list[int]:
    """The numbers of a packed field."""
    numbers: list[int] = []
    while cursor.offset < stop and len(numbers) <= _MOST_DIMENSIONS:
        numbers.append(_varint(cursor))
    return numbers
