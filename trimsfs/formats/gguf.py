"""Parses GGUF: the model's metadata, then descriptions of the tensors, then their bytes.

By https://github.com/ggml-org/ggml, ``docs/gguf.md``; versions 2 and 3, little-endian.
"""

import math
from dataclasses import dataclass

from trimsfs.formats.source import HEADER_LIMIT, Cursor, Source
from trimsfs.formats.table import DTYPE_BITS, FormatError, Tensor, TensorTable, checked_shape, table

NAME = "gguf"
MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_MOST_DIMENSIONS = 8
_LEAST_TENSOR = 24
"""Bytes of the shortest description of a tensor."""
_MOST_NESTED = 4
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9


@dataclass(frozen=True, slots=True)
class _TensorType:
    """A tensor type: *block* elements take *nbytes* bytes."""

    name: str
    block: int
    nbytes: int


def _plain(name: str) -> _TensorType:
    return _TensorType(name, 1, DTYPE_BITS[name] // 8)


_TYPES = {
    0: _plain("float32"),
    1: _plain("float16"),
    2: _TensorType("q4_0", 32, 18),
    3: _TensorType("q4_1", 32, 20),
    6: _TensorType("q5_0", 32, 22),
    7: _TensorType("q5_1", 32, 24),
    8: _TensorType("q8_0", 32, 34),
    9: _TensorType("q8_1", 32, 40),
    10: _TensorType("q2_k", 256, 84),
    11: _TensorType("q3_k", 256, 110),
    12: _TensorType("q4_k", 256, 144),
    13: _TensorType("q5_k", 256, 176),
    14: _TensorType("q6_k", 256, 210),
    15: _TensorType("q8_k", 256, 292),
    16: _TensorType("iq2_xxs", 256, 66),
    17: _TensorType("iq2_xs", 256, 74),
    18: _TensorType("iq3_xxs", 256, 98),
    19: _TensorType("iq1_s", 256, 50),
    20: _TensorType("iq4_nl", 32, 18),
    21: _TensorType("iq3_s", 256, 110),
    22: _TensorType("iq2_s", 256, 82),
    23: _TensorType("iq4_xs", 256, 136),
    24: _plain("int8"),
    25: _plain("int16"),
    26: _plain("int32"),
    27: _plain("int64"),
    28: _plain("float64"),
    29: _TensorType("iq1_m", 256, 56),
    30: _plain("bfloat16"),
    34: _TensorType("tq1_0", 256, 54),
    35: _TensorType("tq2_0", 256, 66),
    39: _TensorType("mxfp4", 32, 17),
}


def parse(source: Source) -> TensorTable:
    """The table of a GGUF file, with shapes reversed to C order. Raises FormatError, and OSError from the source."""
    cursor = Cursor(source)
    if bytes(cursor.take(4)) != MAGIC:
        raise FormatError("not a GGUF file: wrong magic")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise FormatError(f"unsupported GGUF version {version}")
    count, facts = cursor.unpack("QQ")
    if count > min(source.size, HEADER_LIMIT) // _LEAST_TENSOR:
        raise FormatError(f"the file is too small for {count} tensors")
    alignment = _ALIGNMENT
    for _ in range(facts):
        key, kind = cursor.text(cursor.number("Q")), cursor.number("I")
        if key == _ALIGNMENT_KEY and kind == _UINT32:
            alignment = cursor.number("I")
        else:
            _skip(cursor, kind)
    if alignment == 0 or alignment & (alignment - 1):
        raise FormatError(f"alignment {alignment} is not a power of two")
    described = [_tensor(cursor) for _ in range(count)]
    base = -(-cursor.offset // alignment) * alignment
    return table(
        NAME,
        [Tensor(name, kind.name, shape, base + offset, nbytes) for name, kind, shape, offset, nbytes in described],
        source.size,
    )


def _tensor(cursor: Cursor) -> tuple[str, _TensorType, tuple[int, ...], int, int]:
    """The next tensor: its name, type, shape, offset from the first tensor, and size in bytes."""
    name, dimensions = cursor.text(cursor.number("Q")), cursor.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise FormatError(f"tensor {name!r}: {dimensions} dimensions are too many")
    shape = checked_shape(name, cursor.unpack(f"{dimensions}Q")[::-1])
    number, offset = cursor.unpack("IQ")
    kind = _TYPES.get(number)
    if kind is None:
        raise FormatError(f"tensor {name!r}: unknown type {number}")
    elements = math.prod(shape)
    if (shape[-1] if shape else 1) % kind.block:
        raise FormatError(f"tensor {name!r}: its rows are not whole blocks of {kind.name}")
    return name, kind, shape, offset, elements // kind.block * kind.nbytes


def _skip(cursor: Cursor, kind: int, nested: int = 0) -> None:
    """Skip a metadata value."""
    if kind == _STRING:
        cursor.skip(cursor.number("Q"))
    elif kind == _ARRAY:
        if nested == _MOST_NESTED:
            raise FormatError(f"arrays nested too deeply at {cursor.offset}")
        inner, count = cursor.unpack("IQ")
        if inner in _SIZES:
            cursor.skip(count * _SIZES[inner])
            return
        for _ in range(count):
            _skip(cursor, inner, nested + 1)
    elif kind in _SIZES:
        cursor.skip(_SIZES[kind])
    else:
        raise FormatError(f"unknown value type {kind} at {cursor.offset}")
