"""Parses the zip files of PyTorch's ``torch.save`` since 1.6: a pickle, and a member for each storage.

By ``torch.serialization`` and ``torch._utils``.
"""

import math
import zipfile
from collections.abc import Iterator
from typing import Any

from trimsfs.formats.archive import MEMBER_LIMIT, Archive
from trimsfs.formats.pickles import Call, Items, Name, Reference, describe
from trimsfs.formats.source import Source
from trimsfs.formats.table import DTYPE_BITS, FormatError, Tensor, TensorTable, checked_shape, dense, table

NAME = "torch"
PICKLE = "/data.pkl"
_NESTED_LIMIT = 32
_NAME_LIMIT = 4096
_NAMES_LIMIT = MEMBER_LIMIT
"""Characters of a tensor's name, and of all names. Many names may be joined from few keys."""
_KEY_LIMIT = 1 << 64
_STORAGES = {
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
}
_TENSORS = frozenset({"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"})
_TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETERS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})


def parse(source: Source, archive: Archive) -> TensorTable:
    """The table of a file of tensors in dictionaries and lists; a tensor's name is its keys, joined with dots.

    Raises FormatError, and OSError from the source.
    """
    members = {member.filename: member for member in archive.members()}
    pickles = [name for name in members if name.endswith(PICKLE) and name.count("/") == 1]
    if len(pickles) != 1:
        raise FormatError("it has no data.pkl, or several")
    prefix = pickles[0].removesuffix(PICKLE)
    order = members.get(f"{prefix}/byteorder")
    if order is not None and archive.read(order) != b"little":
        raise FormatError("its tensors are not little-endian")
    storages = _Storages(archive, members, f"{prefix}/data/")
    described = describe(archive.read(members[pickles[0]]))
    tensor_table = table(NAME, (storages.tensor(name, call) for name, call in _tensors(described)), source.size)
    if not tensor_table.tensors:
        raise FormatError("it has no dictionary of tensors")
    return tensor_table


def _tensors(value: Any) -> Iterator[tuple[str, Call]]:
    """The calls that make tensors, by name; visits a container in two places only once."""
    seen: set[int] = set()
    named = 0
    left: list[tuple[tuple[str, ...], Iterator[tuple[Any, Any]]]] = [((), iter([(None, value)]))]
    while left:
        path, children = left[-1]
        child = next(children, None)
        if child is None:
            left.pop()
            continue
        key, value = child
        place = path if key is None else (*path, str(key))
        if isinstance(value, Call) and _calls(value, _PARAMETERS):
            value = value.arguments[0]
        if isinstance(value, Call) and _calls(value, _TENSORS | {_TENSOR_OF_DTYPE}):
            length = sum(map(len, place)) + len(place)
            named += length
            if length > _NAME_LIMIT or named > _NAMES_LIMIT:
                raise FormatError("a tensor's name is too long, or all names together are")
            yield ".".join(place), value
        elif isinstance(value, Items | tuple) and id(value) not in seen and len(place) < _NESTED_LIMIT:
            seen.add(id(value))
            left.append((place, _children(value)))


def _calls(value: Call, functions: frozenset[str]) -> bool:
    """Whether this is a call of one of these functions, with arguments."""
    known = isinstance(value.function, Name) and value.function.text in functions
    return known and isinstance(value.arguments, tuple) and len(value.arguments) > 0


def _children(value: "Items | tuple[Any, ...]") -> Iterator[tuple[Any, Any]]:
    """The values in a container, with the keys that form names."""
    if isinstance(value, tuple):
        return iter(enumerate(value))
    if not value.pairs:
        return iter(enumerate(value.elements))
    # Python refuses to print longer numbers.
    return (
        (key, inner)
        for key, inner in value.elements
        if isinstance(key, str) or (isinstance(key, int) and abs(key) < _KEY_LIMIT)
    )


class _Storages:
    def __init__(self, archive: Archive, members: dict[str, zipfile.ZipInfo], prefix: str) -> None:
        self._archive = archive
        self._members = members
        self._prefix = prefix
        self._spans: dict[str, range] = {}

    def tensor(self, name: str, call: Call) -> Tensor:
        """The tensor that a call would make, with the offset of its bytes."""
        match call.arguments:
            case (
                Reference(("storage", Name(kind), str(key), str(), int())),
                int(first),
                tuple(shape),
                tuple(stride),
                *rest,
            ):
                pass
            case _:
                raise FormatError(f"tensor {name!r} is made by an unknown call")
        if call.function.text == _TENSOR_OF_DTYPE:
            match rest:
                case [_, _, Name(text), *notes]:
                    dtype = text.removeprefix("torch.")
                case _:
                    raise FormatError(f"tensor {name!r} is made by an unknown call")
        else:
            dtype, notes = _STORAGES.get(kind, kind), rest[2:]
        if any(isinstance(note, Items) and note.elements for note in notes):
            raise FormatError(f"tensor {name!r} is a view that its bytes alone do not describe")
        sizes = checked_shape(name, shape)
        if not 0 <= first < 1 << 63:
            raise FormatError(f"tensor {name!r} has an invalid offset")
        if not _contiguous(sizes, stride):
            raise FormatError(f"tensor {name!r} is not contiguous")
        span = self._span(key)
        tensor = dense(name, dtype, sizes, span.start + first * DTYPE_BITS.get(dtype, 8) // 8)
        if tensor.offset + tensor.nbytes > span.stop:
            raise FormatError(f"tensor {name!r} is larger than its storage")
        return tensor

    def _span(self, key: str) -> range:
        """The offsets of a storage's bytes in the file."""
        span = self._spans.get(key)
        if span is None:
            member = self._members.get(self._prefix + key)
            if member is None or member.compress_type != zipfile.ZIP_STORED:
                raise FormatError(f"storage {key!r} is missing or compressed")
            span = self._spans[key] = self._archive.span(member)
        return span


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements are contiguous in C order."""
    if len(shape) != len(stride) or not all(type(step) is int for step in stride):
        return False
    if math.prod(shape) == 0:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
