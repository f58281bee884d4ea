"""Models to be measured: objects of a bucket, which are read as local files as well."""

import json
import math
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.data import BUCKET, heat
from tests.benchmarks.scale import MIB, size_text

_BLOCK = 8 * MIB
_LARGEST = 32 * MIB
_BIAS = 2048
_COLUMNS = 128
_ALIGNMENT = 64


class Model(NamedTuple):
    """A file's name in the bucket, its bytes, and one of its tensors with the CRC-32 of its bytes."""

    name: str
    nbytes: int
    probe: str
    checksum: int


@dataclass(frozen=True, slots=True)
class Models:
    """Safetensors files of random bytes, made when they are first asked for."""

    root: Path
    _made: dict[int, Model] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """The directory that the endpoint serves."""
        return self.root / "store"

    def path(self, name: str) -> Path:
        """An object's file on the local disk."""
        return self.store / BUCKET / name

    def model(self, size: int) -> Model:
        """A model of about *size* bytes, in pairs of a large and a small tensor of float16."""
        if size not in self._made:
            self._made[size] = _write(self.path(f"{size_text(size).replace(' ', '-')}.safetensors"), size)
        return self._made[size]

    def heat(self, name: str) -> None:
        """Bring a file into the page cache."""
        heat(self.path(name))

    def remove(self, size: int) -> None:
        """Give the space of a model back, and of what was made of it."""
        model = self._made.pop(size)
        for path in (self.path(model.name), self.path(model.name).with_suffix(".pt")):
            path.unlink(missing_ok=True)


def _write(path: Path, size: int) -> Model:
    layers = max(2, math.ceil(size / _LARGEST))
    rows = max(1, (size // layers // 2 - _BIAS) // _COLUMNS)
    header: dict[str, object] = {}
    end = 0
    for layer in range(layers):
        for kind, shape in (("weight", [rows, _COLUMNS]), ("bias", [_BIAS])):
            begin, end = end, end + 2 * math.prod(shape)
            header[f"layers.{layer}.{kind}"] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    checksum = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for layer in range(layers):
            checksum = 0
            for piece in _content(2 * rows * _COLUMNS, layer):
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
            file.write(bytes(2 * _BIAS))
    return Model(path.name, path.stat().st_size, f"layers.{layers - 1}.weight", checksum)


def _content(size: int, seed: int) -> Iterator[bytes]:
    """Bytes that no other seed gives, in pieces: a block again and again, and where each is."""
    block = random.Random(seed).randbytes(min(size, _BLOCK))
    for offset in range(0, size, len(block)):
        yield (struct.pack("<Q", offset) + block[8:])[: size - offset]
