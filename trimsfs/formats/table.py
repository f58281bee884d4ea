"""The tensor table: the tensors of a model file and the offsets of their bytes."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class FormatError(ValueError):
    """A file has an unknown format, or is malformed."""


DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 8),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 16),
    **dict.fromkeys(("uint32", "int32", "float32"), 32),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 64),
    "complex128": 128,
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 8),
    **dict.fromkeys(("float6_e2m3fn", "float6_e3m2fn"), 6),
    **dict.fromkeys(("float4_e2m1fn", "uint4", "int4"), 4),
}
"""Bits of an element, by type names of NumPy and ml_dtypes."""


MOST_DIMENSIONS = 64
MOST_TENSORS = 1 << 17
MOST_SIGNS = 20 * MOST_TENSORS
"""The most ``{``, ``[``, ``,`` and ``:`` in a description in JSON, also in its strings.

A tensor of four dimensions in a safetensors header has 14.
"""


class Tensor(NamedTuple):
    """A tensor in C order: ``nbytes`` bytes at ``offset`` of ``file``, which is None for the model file itself.

    ``file`` is a relative path below the directory of the model file. ``dtype`` is a key of DTYPE_BITS or, for blocks
    of quantised weights, GGUF's name in lower case.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: str | None = None


@dataclass(frozen=True, slots=True)
class TensorTable:
    """The tensors of a model file, in file order. If not *named*, the file is a list, and names are positions."""

    format: str
    tensors: tuple[Tensor, ...]
    named: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def as_json(self) -> bytes:
        """The table as JSON, made tensor by tensor: one call for all would keep other threads waiting."""
        tensors = ", ".join(json.dumps(entry_of(tensor)) for tensor in self.tensors)
        return f'{{"format": {json.dumps(self.format)}, "tensors": [{tensors}]}}'.encode()


def entry_of(tensor: Tensor) -> dict[str, object]:
    """A tensor as a value for JSON; ``file`` is left out for the model file itself."""
    return {name: value for name, value in tensor._asdict().items() if name != "file" or value is not None}


def dense(name: str, dtype: str, shape: Iterable[int], offset: int, *, file: str | None = None) -> Tensor:
    """A tensor whose size follows from its dtype and shape. Raises FormatError for an unknown dtype."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise FormatError(f"tensor {name!r}: unknown dtype {dtype!r}")
    sizes = checked_shape(name, shape)
    return Tensor(name, dtype, sizes, offset, -(-math.prod(sizes) * bits // 8), file)


def checked_shape(name: str, shape: Iterable[int]) -> tuple[int, ...]:
    """The shape, after a check of its sizes. Raises FormatError."""
    sizes = tuple(shape)
    if len(sizes) > MOST_DIMENSIONS:
        raise FormatError(f"tensor {name!r}: {len(sizes)} dimensions are too many")
    for size in sizes:
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise FormatError(f"tensor {name!r}: an invalid size")
    if math.prod(size or 1 for size in sizes) >= 1 << 63:
        raise FormatError(f"tensor {name!r}: too many elements")
    return sizes


def check_json(text: str) -> None:
    """Check that a description in JSON takes no memory out of proportion once it is decoded. Raises FormatError."""
    if sum(map(text.count, "{[,:")) > MOST_SIGNS:
        raise FormatError("its description in JSON has too many values")


def table(name: str, tensors: Iterable[Tensor], size: int, *, named: bool = True) -> TensorTable:
    """Make a table, after checks that tensors lie in *size* bytes and names are unique. Raises FormatError."""
    checked: list[Tensor] = []
    for tensor in tensors:
        if len(checked) == MOST_TENSORS:
            raise FormatError(f"more than {MOST_TENSORS} tensors")
        checked.append(tensor)
        if tensor.file is None and not 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size:
            raise FormatError(
                f"tensor {tensor.name!r}: its bytes [{tensor.offset}, {tensor.offset + tensor.nbytes}) "
                f"exceed the file of {size} bytes"
            )
    if len({tensor.name for tensor in checked}) != len(checked):
        raise FormatError("two tensors have the same name")
    return TensorTable(name, tuple(checked), named)
