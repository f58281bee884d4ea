"""Parses NumPy's ``.npy`` and uncompressed ``.npz``.

By ``numpy.lib.format``. Arrays of objects, which are pickles, and arrays in Fortran order are not supported.
"""

import ast
import zipfile
from collections.abc import Iterator

from trimsfs.formats.archive import Archive
from trimsfs.formats.source import Cursor, Source
from trimsfs.formats.table import FormatError, Tensor, TensorTable, checked_shape, dense, table

NPY, NPZ = "npy", "npz"
MAGIC = b"\x93NUMPY"
SUFFIX = ".npy"
_LONGEST = 4 << 10
_DTYPES = {
    "b1": "bool",
    "u1": "uint8",
    "i1": "int8",
    "u2": "uint16",
    "i2": "int16",
    "u4": "uint32",
    "i4": "int32",
    "u8": "uint64",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
}
_NATIVE = "<|="


def parse(source: Source) -> TensorTable:
    """The table of a ``.npy`` file: one tensor, without a name. Raises FormatError, and OSError from the source."""
    return table(NPY, [_array("", Cursor(source))], source.size)


def parse_npz(source: Source, archive: Archive) -> TensorTable:
    """The table of a ``.npz`` file. Raises FormatError, and OSError from the source."""
    return table(NPZ, _members(source, archive), source.size)


def _members(source: Source, archive: Archive) -> Iterator[Tensor]:
    cursor = Cursor(source)
    for member in archive.members():
        if not member.filename.endswith(SUFFIX):
            raise FormatError(f"member {member.filename!r} is not a .npy array")
        if member.compress_type != zipfile.ZIP_STORED:
            raise FormatError(f"member {member.filename!r} is compressed: save it with numpy.savez")
        span = archive.span(member)
        tensor = _array(member.filename.removesuffix(SUFFIX), cursor.at(span.start))
        if tensor.offset + tensor.nbytes > span.stop:
            raise FormatError(f"member {member.filename!r} is shorter than its array")
        yield tensor


def _array(name: str, cursor: Cursor) -> Tensor:
    if bytes(cursor.take(len(MAGIC))) != MAGIC:
        raise FormatError(f"array {name!r} is not a .npy array: wrong magic")
    major, _ = cursor.unpack("BB")
    length = cursor.number("H" if major == 1 else "I")
    if length > _LONGEST:
        raise FormatError(f"array {name!r}: its header of {length} bytes is too long")
    text = cursor.text(length)
    try:
        header = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError):
        raise FormatError(f"array {name!r}: its header is not a dictionary") from None
    match header:
        case {"descr": str(descr), "fortran_order": bool(fortran), "shape": tuple(shape)}:
            sizes = checked_shape(name, shape)
        case _:
            raise FormatError(f"array {name!r}: its type is structured, or its header is incomplete")
    if fortran and sum(size > 1 for size in sizes) > 1:
        raise FormatError(f"array {name!r} is in Fortran order")
    if descr[:1] not in _NATIVE or descr[1:] not in _DTYPES:
        raise FormatError(f"array {name!r}: dtype {descr!r} is not supported")
    return dense(name, _DTYPES[descr[1:]], sizes, cursor.offset)
