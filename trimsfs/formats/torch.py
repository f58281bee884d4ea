"""PyTorch's zip files, as ``torch.save`` has made them since 1.6: a pickle, and each storage as a member beside it.

By ``torch.serialization`` and ``torch._utils``.
"""

import math
import zipfile
from collections.abc import Iterator
from typing import Any

from trimsfs.formats.archive import Archive
from trimsfs.formats.pickles import Call, Items, Name, Reference, describe
from trimsfs.formats.source import Source
from trimsfs.formats.table import DTYPE_BITS, FormatError, Tensor, TensorTable, checked_shape, dense, table

NAME = "torch"
PICKLE = "/data.pkl"
_NESTED_LIMIT = 32
_NAME_LIMIT = 4096
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
    """The table of a file of tensors in dictionaries and lists, named by their keys joined with dots.

    Raises FormatError, and OSError from the source.
    """
    members = {member.filename: member for member in archive.members()}
    pickles = [name for name in members if name.endswith(PICKLE) and name.count("/") == 1]
    if len(pickles) != 1:
        raise FormatError("it does not hold one data.pkl")
    prefix = pickles[0].removesuffix(PICKLE)
    order = members.get(f"{prefix}/byteorder")
    if order is not None and archive.read(order) != b"little":
        raise FormatError("its tensors are not little-endian")
    storages = _Storages(archive, members, f"{prefix}/data/")
    found = [storages.tensor(name, call) for name, call in _tensors(describe(archive.read(members[pickles[0]])))]
    if not found:
        raise FormatError("it holds no dictionary of tensors")
    return table(NAME, found, source.size)


def _tensors(value: Any) -> Iterator[tuple[str, Call]]:
    """The calls that make tensors, by name; what is in two places is named for the first unless it is a tensor."""
    seen: set[int] = set()
    left: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while left:
        path, value = left.pop()
        if isinstance(value, Call) and isinstance(value.function, Name):
            name = ".".join(path)
            if len(name) > _NAME_LIMIT:
                raise FormatError("a tensor's name is too long")
            if value.function.text in _PARAMETERS and isinstance(value.arguments, tuple) and value.arguments:
                left.append((path, value.arguments[0]))
            elif value.function.text in _TENSORS | {_TENSOR_OF_DTYPE}:
                yield name, value
        elif isinstance(value, Items | tuple) and id(value) not in seen and len(path) < _NESTED_LIMIT:
            seen.add(id(value))
            left.extend(reversed([((*path, str(key)), inner) for key, inner in _children(value)]))


def _children(value: "Items | tuple[Any, ...]") -> list[tuple[Any, Any]]:
    """The values inside of a container, with keys that may be part of a name."""
    if isinstance(value, tuple):
        return list(enumerate(value))
    if not value.pairs:
        return list(enumerate(value.elements))
    # A number that is too long cannot even be written.
    return [
        (key, inner)
        for key, inner in value.elements
        if isinstance(key, str) or (isinstance(key, int) and abs(key) < _KEY_LIMIT)
    ]


class _Storages:
    def __init__(self, archive: Archive, members: dict[str, zipfile.ZipInfo], prefix: str) -> None:
        self._archive = archive
        self._members = members
        self._prefix = prefix
        self._spans: dict[str, range] = {}

    def tensor(self, name: str, call: Call) -> Tensor:
        """Where the bytes of a tensor are."""
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
                raise FormatError(f"tensor {name!r} is made in an unknown way")
        if call.function.text == _TENSOR_OF_DTYPE:
            match rest:
                case [_, _, Name(text), *_]:
                    dtype = text.removeprefix("torch.")
                case _:
                    raise FormatError(f"tensor {name!r} is made in an unknown way")
        else:
            dtype = _STORAGES.get(kind, kind)
        if not all(type(size) is int for size in (*shape, *stride)) or first < 0:
            raise FormatError(f"tensor {name!r} has an impossible shape")
        sizes = checked_shape(name, shape)
        if not _contiguous(sizes, stride):
            raise FormatError(f"tensor {name!r} is not contiguous")
        span = self._span(key)
        tensor = dense(name, dtype, sizes, span.start + first * DTYPE_BITS.get(dtype, 8) // 8)
        if tensor.offset + tensor.nbytes > span.stop:
            raise FormatError(f"tensor {name!r} is larger than its storage")
        return tensor

    def _span(self, key: str) -> range:
        """Where the bytes of a storage are."""
        span = self._spans.get(key)
        if span is None:
            member = self._members.get(self._prefix + key)
            if member is None or member.compress_type != zipfile.ZIP_STORED:
                raise FormatError(f"storage {key!r} is missing or compressed")
            span = self._spans[key] = self._archive.span(member)
        return span


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements follow each other in C order."""
    if len(shape) != len(stride):
        return False
    if math.prod(shape) == 0:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
