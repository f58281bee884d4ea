"""Parses safetensors: the length of a JSON header, then the header, then the tensors' bytes.

By https://github.com/huggingface/safetensors, "Format".
"""

import json
from collections.abc import Iterator
from typing import Any

from trimsfs.formats.source import Cursor, Source
from trimsfs.formats.table import FormatError, Tensor, TensorTable, check_json, dense, table

NAME = "safetensors"
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn",
}


def parse(source: Source) -> TensorTable:
    """The table of a safetensors file. Raises FormatError, and OSError from the source."""
    cursor = Cursor(source)
    length = cursor.number("Q")
    text = cursor.text(length)
    check_json(text)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise FormatError("its header is not a JSON object")
    tensors = sorted(_tensors(header, cursor.offset), key=lambda tensor: tensor.offset)
    return table(NAME, tensors, source.size)


def _tensors(header: dict[str, Any], base: int) -> Iterator[Tensor]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
                0 <= begin <= end < 1 << 63
            ):
                tensor = dense(name, _DTYPES.get(dtype, dtype), shape, base + begin)
            case _:
                raise FormatError(f"tensor {name!r}: its entry in the header is incomplete or invalid")
        if end - begin != tensor.nbytes:
            raise FormatError(f"tensor {name!r}: {end - begin} bytes where its shape needs {tensor.nbytes}")
        yield tensor
