"""Digests of whole objects, as stores compute them: over all bytes, or over the digests of parts."""

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal, Protocol

from trimsfs.checksums import Crc, combine_crc32c, crc32, crc32c, crc64nvme
from trimsfs.types import ChunkRecord

try:
    from trimsfs.stores import _md5
except ImportError:  # the extension was not built: hashlib digests the parts one after the other
    _md5 = None  # type: ignore[assignment]

Algorithm = Literal["crc32", "crc32c", "crc64nvme", "git-sha1", "md5", "sha1", "sha256"]
"""As in hashlib; "git-sha1" is the id that git gives a file: a SHA-1 of its size and bytes."""

TINY = 1 << 16
"""Bytes up to which computing a digest is quicker than handing the work to a thread."""
PIECE = 1 << 20
"""Bytes digested at a time: few enough to stay in a core's cache."""
MIB = 1 << 20
RWF_DONTCACHE = 0x80
"""From <linux/fs.h>, since Linux 6.14: drops the pages that a read has added to the page cache."""
MD5_BLOCK = 64
MD5_START = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
"""The bytes of an MD5 block, and the initial state."""
LANES = 0 if _md5 is None else _md5.LANES
"""Parts whose MD5s are computed side by side."""
FEWEST_LANES = 6
"""With fewer parts left, digesting them one after the other is about as fast."""
USUAL_PART_SIZES = tuple(size * MIB for size in (8, 16, 5, 64, 10, 15, 32, 50, 100, 128, 256, 512))
"""The part sizes of common upload programs, the most common first."""
MOST_GUESSES = 3
_CRCS: dict[str, tuple[Crc, int]] = {"crc32": (crc32, 4), "crc32c": (crc32c, 4), "crc64nvme": (crc64nvme, 8)}
"""CRC functions and the number of bytes in their results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The digest of an object's bytes, according to the store or, if ``signed``, to a manifest.

    For a multipart object, ``parts`` is their number and the value is the digest of their digests; else it is 0.
    ``part_size`` is None if the store does not tell it. If not ``certain``, the value may be no digest, as some ETags.
    """

    algorithm: Algorithm
    value: bytes
    parts: int = 0
    part_size: int | None = None
    certain: bool = True
    signed: bool = False

    @property
    def at_once(self) -> bool:
        """Whether to compare it before an open: it is signed, or quick to compute."""
        return self.signed or self.algorithm in _CRCS

    @property
    def binding(self) -> bool:
        """Whether bytes with another digest are certainly wrong. A digest of parts is not: their sizes may differ."""
        return self.certain and not self.parts

    @property
    def of_nothing(self) -> bytes:
        """The digest of an empty file."""
        return _digest_of(self.algorithm, b"")

    def part_sizes(self, size: int) -> list[int]:
        """The possible part sizes of an object of *size* bytes, the likeliest first; [0] if it has no parts."""
        if not self.parts:
            return [0]
        if self.part_size is not None:
            return [self.part_size]
        usual = [guess for guess in USUAL_PART_SIZES if -(-size // guess) == self.parts]
        smallest = -(-size // self.parts)
        rounded = -(-smallest // MIB) * MIB  # programs choose this to stay below 10,000 parts
        if rounded not in usual and -(-size // rounded) == self.parts:
            usual.append(rounded)
        return usual[:MOST_GUESSES]

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value.hex()}" + (f"-{self.parts}" if self.parts else "")


class _Hash(Protocol):
    def update(self, data: memoryview | bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class _CrcHash:
    """A CRC with the interface of hashlib."""

    def __init__(self, function: Crc, width: int) -> None:
        self._function = function
        self._width = width
        self._value = 0

    def update(self, data: memoryview | bytes, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width)


def _digest_of(algorithm: Algorithm, data: bytes) -> bytes:
    whole = _new(algorithm, len(data))
    whole.update(data)
    return whole.digest()


def _new(algorithm: Algorithm, size: int) -> _Hash:
    """The digest of *size* bytes, before the first of them."""
    if algorithm in _CRCS:
        return _CrcHash(*_CRCS[algorithm])
    if algorithm == "git-sha1":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.new(algorithm, usedforsecurity=False)


def compute(descriptor: int, size: int, algorithm: Algorithm, part_size: int) -> bytes | None:
    """The digest of the first *size* bytes of a file, in parts unless *part_size* is 0; None if the file is shorter.

    Except for tiny files, it adds no pages to the page cache if the kernel supports that. Raises OSError.
    """
    if size <= TINY and not part_size:
        data = os.pread(descriptor, size, 0)
        return _digest_of(algorithm, data) if len(data) == size else None
    file = _File(descriptor)
    try:
        if not part_size:
            return file.digest(algorithm, 0, size)
        of_parts = _new(algorithm, 0)  # no store has parts by git's ids
        for part in _digests_of_parts(file, size, algorithm, part_size):
            of_parts.update(part)
        return of_parts.digest()
    except EOFError:
        return None


def _digests_of_parts(file: "_File", size: int, algorithm: Algorithm, part_size: int) -> Iterator[bytes]:
    start = 0
    while True:
        count = min(LANES, (size - start) // part_size)
        if algorithm == "md5" and part_size % MD5_BLOCK == 0 and count >= FEWEST_LANES:
            yield from file.md5_side_by_side(start, part_size, count)
            start += count * part_size
        else:
            stop = min(size, start + part_size)
            yield file.digest(algorithm, start, stop)
            start = stop
        if start >= size:
            return


class _File:
    """A file to digest piece by piece. Its methods raise EOFError when the file ends too early."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = memoryview(mmap.mmap(-1, PIECE))
        self._flags = RWF_DONTCACHE
        try:
            os.preadv(descriptor, [bytearray(1)], 0, self._flags)
        except OSError:  # the kernel or the file system does not support it
            self._flags = 0

    def digest(self, algorithm: Algorithm, start: int, stop: int) -> bytes:
        """The digest of the bytes ``[start, stop)``."""
        hasher = _new(algorithm, stop - start)
        for offset in range(start, stop, PIECE):
            piece = self._buffer[: min(PIECE, stop - offset)]
            self._read(piece, offset)
            hasher.update(piece)
        return hasher.digest()

    def md5_side_by_side(self, start: int, size: int, count: int) -> list[bytes]:
        """The MD5s of *count* parts of *size* bytes each, from *start* on. Lanes without a part digest any bytes."""
        state = bytearray(b"".join(word.to_bytes(4, "little") * LANES for word in MD5_START))
        most = PIECE // LANES
        for offset in range(0, size, most):
            length = min(most, size - offset)
            for lane in range(count):
                self._read(self._buffer[lane * length : (lane + 1) * length], start + lane * size + offset)
            _md5.update(state, self._buffer[: LANES * length])
        end = b"\x80".ljust(MD5_BLOCK - 8, b"\0") + (8 * size).to_bytes(8, "little")
        _md5.update(state, end * LANES)
        words = [state[at : at + 4] for at in range(0, len(state), 4)]
        return [b"".join(words[lane::LANES]) for lane in range(count)]

    def _read(self, piece: memoryview, offset: int) -> None:
        """Fill *piece* with the bytes from *offset* on."""
        while piece:
            count = os.preadv(self._descriptor, [piece], offset, self._flags)
            if count == 0:
                raise EOFError
            piece, offset = piece[count:], offset + count


def crc32c_of(chunks: Iterable[ChunkRecord]) -> bytes:
    """The CRC32C of a whole object, combined from those of all its chunks, in order."""
    whole = reduce(lambda crc, chunk: combine_crc32c(crc, chunk.crc, chunk.length), chunks, 0)
    return whole.to_bytes(_CRCS["crc32c"][1])
