"""Digests of whole objects, as stores have them: of all bytes, or of the digests of parts."""

import hashlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Literal, Protocol

from trimsfs.checksums import Crc, combine_crc32c, crc32, crc32c, crc64nvme
from trimsfs.types import ChunkRecord

Algorithm = Literal["crc32", "crc32c", "crc64nvme", "md5", "sha1", "sha256"]

PIECE = 1 << 20
"""Bytes digested at a time: few enough to stay in a core's cache."""
MIB = 1 << 20
USUAL_PART_SIZES = tuple(size * MIB for size in (8, 16, 5, 64, 10, 15, 32, 50, 100, 128, 256, 512))
"""Of programs that upload in parts, the most common first."""
MOST_GUESSES = 3
_CRCS: dict[str, tuple[Crc, int]] = {"crc32": (crc32, 4), "crc32c": (crc32c, 4), "crc64nvme": (crc64nvme, 8)}
"""With their bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The digest of an object's bytes, according to the store or, if ``signed``, to a manifest.

    ``parts`` is not 0 for an object uploaded in so many parts: it is the digest of their digests, and ``part_size`` is
    None where the store does not tell it. A digest that is not ``certain`` may be none, as some ETags.
    """

    algorithm: Algorithm
    value: bytes
    parts: int = 0
    part_size: int | None = None
    certain: bool = True
    signed: bool = False

    @property
    def at_once(self) -> bool:
        """Whether it is compared before a file is opened: it is signed, or takes next to no time to compute."""
        return self.signed or self.algorithm in _CRCS

    @property
    def binding(self) -> bool:
        """Whether bytes that have another digest are certainly wrong. Of parts that is not certain: they need not all
        be of one size."""
        return self.certain and not self.parts

    @property
    def of_nothing(self) -> bytes:
        """The digest of no bytes at all."""
        return _new(self.algorithm).digest()

    def part_sizes(self, size: int) -> list[int]:
        """The sizes that the parts of an object of *size* bytes may have, the likeliest first; 0: without parts."""
        if not self.parts:
            return [0]
        if self.part_size is not None:
            return [self.part_size]
        usual = [guess for guess in USUAL_PART_SIZES if -(-size // guess) == self.parts]
        smallest = -(-size // self.parts)
        rounded = -(-smallest // MIB) * MIB  # what programs choose for objects that would have more than 10,000 parts
        if rounded not in usual and -(-size // rounded) == self.parts:
            usual.append(rounded)
        return usual[:MOST_GUESSES]

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value.hex()}" + (f"-{self.parts}" if self.parts else "")


class _Hash(Protocol):
    def update(self, data: memoryview | bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class _CrcHash:
    """A CRC in the form of hashlib."""

    def __init__(self, function: Crc, width: int) -> None:
        self._function = function
        self._width = width
        self._value = 0

    def update(self, data: memoryview | bytes, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width)


def _new(algorithm: Algorithm) -> _Hash:
    if algorithm in _CRCS:
        return _CrcHash(*_CRCS[algorithm])
    return hashlib.new(algorithm, usedforsecurity=False)


def compute(descriptor: int, size: int, algorithm: Algorithm, part_size: int) -> bytes | None:
    """The digest of the first *size* bytes of a file, in parts unless *part_size* is 0; None when it ends before.

    Raises OSError.
    """
    buffer = memoryview(mmap.mmap(-1, PIECE))
    of_parts = _new(algorithm)
    offset = 0
    while True:
        stop = min(size, offset + part_size) if part_size else size
        part = _new(algorithm)
        while offset < stop:
            count = os.preadv(descriptor, [buffer[: stop - offset]], offset)
            if count == 0:
                return None
            part.update(buffer[:count])
            offset += count
        if not part_size:
            return part.digest()
        of_parts.update(part.digest())
        if offset == size:
            return of_parts.digest()


def crc32c_of(chunks: Iterable[ChunkRecord]) -> bytes:
    """The CRC32C of a whole object, from the chunks it consists of in their order."""
    whole = reduce(lambda crc, chunk: combine_crc32c(crc, chunk.crc, chunk.length), chunks, 0)
    return whole.to_bytes(_CRCS["crc32c"][1])
