"""Seeded random weights, written as ``mx.nd.save`` would, a piece at a time: no more than two blocks are in memory.

Weights are He's normal times their layer's gain; scales and variances are 1, all else is 0. The normals of a network
are one block, seeded with its name, over and over: each array begins at another place in it, so none equals another.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from .models import MODELS, Entry

_BLOCK = (1 << 22) - 3
"""Numbers in a block, 16 MiB: a prime, so that the rows of a matrix, of whatever length, all differ."""
_STEP = 1_000_003
"""From where one array begins in the block to where the next does."""
_LIST, _NDARRAY_V2, _DENSE, _CPU, _FLOAT32 = 0x112, 0xF993FAC9, 0, 1, 0


@dataclass(frozen=True)
class Array:
    """A parameter: its name in a checkpoint, its shape, and the gain of its layer."""

    name: str
    shape: tuple[int, ...]
    gain: float

    @property
    def nbytes(self) -> int:
        """Bytes of its float32."""
        return 4 * prod(self.shape)

    @property
    def constant(self) -> float | None:
        """What every number of it is; None where they are random."""
        if len(self.shape) > 1:
            return None
        return 1 if self.name.endswith(("_gamma", "_var")) else 0


def arrays(entry: Entry) -> list[Array]:
    """The parameters of a network, in the order of a checkpoint."""
    symbol = entry.symbol()
    attributes = symbol.attr_dict()
    shapes, _, auxiliary = symbol.infer_shape(data=entry.input_shape)
    named = [("arg", *each) for each in zip(symbol.list_arguments(), shapes, strict=True) if each[0] != "data"]
    named += [("aux", *each) for each in zip(symbol.list_auxiliary_states(), auxiliary, strict=True)]
    return [
        Array(f"{kind}:{name}", shape, float(attributes.get(name[: -len("_weight")], {}).get("__gain__", 1)))
        for kind, name, shape in named
    ]


def parameter_bytes(entry: Entry) -> int:
    """Bytes of a network's float32 parameters, worked out without making them."""
    return sum(array.nbytes for array in arrays(entry))


def write_model(name: str, directory: Path) -> int:
    """Write a network's ``symbol.json`` and ``params``, always the same; the bytes of ``params``.

    A file has its name only when it is whole. Raises KeyError where there is no such network, and OSError.
    """
    entry = MODELS[name]
    directory.mkdir(parents=True, exist_ok=True)
    with _replacing(directory / "params") as file:
        _write(file, arrays(entry), zlib.crc32(name.encode()))
        size = file.tell()
    with _replacing(directory / "symbol.json") as file:
        file.write(entry.symbol().tojson().encode())
    return size


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, written: list[Array], seed: int) -> None:
    """By MXNet 1.9, ``src/ndarray/ndarray.cc``: ``NDArray::Save``."""
    block = np.random.default_rng(seed).standard_normal(_BLOCK, dtype=np.float32)
    file.write(struct.pack("<QQQ", _LIST, 0, len(written)))
    for number, array in enumerate(written):
        dimensions = len(array.shape)
        file.write(struct.pack(f"<IiI{dimensions}q", _NDARRAY_V2, _DENSE, dimensions, *array.shape))
        file.write(struct.pack("<iii", _CPU, 0, _FLOAT32))
        if array.constant is not None:
            file.write(np.full(array.shape, array.constant, np.float32).data)
        else:
            deviation = array.gain * sqrt(2 / prod(array.shape[1:]))
            _write_random(file, block, number * _STEP % _BLOCK, prod(array.shape), deviation)
    file.write(struct.pack("<Q", len(written)))
    for array in written:
        file.write(struct.pack("<Q", len(array.name)) + array.name.encode())


def _write_random(file: BinaryIO, block: npt.NDArray[np.float32], start: int, count: int, deviation: float) -> None:
    scaled = np.empty(min(count, block.size), np.float32)
    while count > 0:
        piece = block[start : start + count]
        file.write(np.multiply(piece, np.float32(deviation), out=scaled[: piece.size]).data)
        count -= piece.size
        start = 0
