"""Small model files of each format, written byte by byte, by what their libraries document."""

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimsfs.client.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


WEIGHT = Array("float32", (2, 3), struct.pack("<6f", *range(6)))
BIAS = Array("int64", (3,), struct.pack("<3q", 7, 8, 9))
HALF = Array("float16", (4,), struct.pack("<4e", 1, 2, 3, 4))
ARRAYS: Mapping[str, Array] = {"net.weight": WEIGHT, "net.bias": BIAS, "half": HALF}


def content(model: Tensors) -> dict[str, Array]:
    """The tensors of a model that is open."""
    return {each.name: Array(each.dtype, each.shape, bytes(model.raw(each))) for each in model.table.tensors}


_MXNET = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int64": 6}
_SAFETENSORS = {
    "float32": "F32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float4_e2m1fn": "F4",
}
_GGUF = {"float32": 0, "int64": 27, "float16": 1}
_NUMPY = {"float32": "<f4", "int64": "<i8", "float16": "<f2"}
_TORCH = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}
_ONNX = {"float32": 1, "int64": 7, "float16": 10}


def mxnet(arrays: Mapping[str, Array] = ARRAYS, *, version: int = 2, named: bool = True) -> bytes:
    """A ``.params`` file; *version* 0 is the oldest kind of array."""
    parts = [struct.pack("<QQQ", 0x112, 0, len(arrays))]
    for array in arrays.values():
        shape, count = array.shape, len(array.shape)
        if version == 0:
            parts.append(struct.pack(f"<I{count}I", count, *shape))
        elif version == 1:
            parts.append(struct.pack(f"<II{count}q", 0xF993FAC8, count, *shape))
        else:
            parts.append(struct.pack(f"<Iii{count}q", 0xF993FAC7 + version, 0, count, *shape))
        parts += [struct.pack("<iii", 1, 0, _MXNET[array.dtype]), array.data]
    names = [name.encode() for name in arrays] if named else []
    parts.append(struct.pack("<Q", len(names)))
    parts += [struct.pack("<Q", len(name)) + name for name in names]
    return b"".join(parts)


def safetensors(arrays: Mapping[str, Array] = ARRAYS) -> bytes:
    """A safetensors file with metadata."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in arrays.items():
        span = [offset, offset + len(array.data)]
        header[name] = {"dtype": _SAFETENSORS[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset += len(array.data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(array.data for array in arrays.values())


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(arrays: Mapping[str, Array] = ARRAYS, *, alignment: int = 64) -> bytes:
    """A GGUF file with facts of several types."""
    facts = [
        _string("general.architecture") + struct.pack("<I", 8) + _string("llama"),
        _string("general.alignment") + struct.pack("<II", 4, alignment),
        _string("tokens") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + _string("bc"),
        _string("scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 1.5),
        _string("flag") + struct.pack("<IB", 7, 1),
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(facts)) + b"".join(facts)
    body = b""
    for name, array in arrays.items():
        body += bytes(-len(body) % alignment)
        header += _string(name) + struct.pack("<I", len(array.shape))
        header += struct.pack(f"<{len(array.shape)}Q", *reversed(array.shape))
        header += struct.pack("<IQ", _GGUF[array.dtype], len(body))
        body += array.data
    return header + bytes(-len(header) % alignment) + body


def npy(array: Array = WEIGHT) -> bytes:
    text = repr({"descr": _NUMPY[array.dtype], "fortran_order": False, "shape": array.shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.data


def npz(arrays: Mapping[str, Array] = ARRAYS, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy(array))
    return file.getvalue()


class _Storage:
    """A storage, which is pickled as a reference."""

    def __init__(self, kind: str, key: str, elements: int) -> None:
        self.identity = ("storage", _Global("torch", kind), key, "cpu", elements)


class _Global:
    """A name of a module that is not there."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Tensor:
    """What pickles as a call to torch's function."""

    def __init__(self, function: str, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments


_PythonPickler: Any = vars(pickle)["_Pickler"]
"""The one in C cannot write names at will."""


class _Pickler(_PythonPickler):  # type: ignore[misc]
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, _Storage) else None

    def save(self, value: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(value, _Global):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Tensor):
            self.save(_Global("torch._utils", value.function))
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *arguments, **options)
        return None


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def torch(arrays: Mapping[str, Array] = ARRAYS, *, protocol: int = 2, nested: bool = False) -> bytes:
    """A file as ``torch.save`` makes it, of a dictionary by name; *nested* puts it into another one."""
    file, pickled = io.BytesIO(), io.BytesIO()
    tensors: dict[str, Any] = {}
    with zipfile.ZipFile(file, "w") as archive:
        for number, (name, array) in enumerate(arrays.items()):
            elements = len(array.data) * 8 // {"float32": 32, "int64": 64, "float16": 16}[array.dtype]
            storage = _Storage(_TORCH[array.dtype], str(number), elements)
            call = _Tensor("_rebuild_tensor_v2", storage, 0, array.shape, strides(array.shape), False, {})
            tensors[name] = call if number else _Tensor("_rebuild_parameter", call, True, {})
        _Pickler(pickled, protocol).dump({"epoch": 3, "state": tensors} if nested else tensors)
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{number}", array.data)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def onnx(arrays: Mapping[str, Array] = ARRAYS, *, external: Mapping[str, str] | None = None) -> bytes:
    """An ONNX model; with *external* entries all tensors are where those tell."""
    graph = field(1, field(1, b"input") + field(4, b"Relu")) + field(2, b"graph")
    for name, array in arrays.items():
        dims = b"".join(_varint(size) for size in array.shape)
        tensor = field(1, dims) + field(2, _ONNX[array.dtype]) + field(8, name.encode())
        if external is None:
            tensor += field(9, array.data)
        else:
            for key, value in external.items():
                tensor += field(13, field(1, key.encode()) + field(2, value.encode()))
            tensor += field(14, 1)
        graph += field(5, tensor)
    return field(1, 9) + field(2, b"writer") + field(7, graph) + field(8, field(2, 17))


FILES: Mapping[str, tuple[str, bytes]] = {
    "mxnet": ("model.params", mxnet()),
    "safetensors": ("model.safetensors", safetensors()),
    "gguf": ("model.gguf", gguf()),
    "npy": ("array.npy", npy()),
    "npz": ("arrays.npz", npz()),
    "torch": ("model.pt", torch()),
    "onnx": ("model.onnx", onnx()),
}
"""A name and the bytes of a file of each format."""
