"""Describes the files of a version before it is published: their SHA-256s and fingerprints, from one reading."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from trimsfs.checksums import crc32c, crc64nvme
from trimsfs.concurrency.in_thread import in_thread
from trimsfs.extras.versions.content import Content
from trimsfs.formats import safetensors
from trimsfs.formats.fingerprints import Fingerprint, TensorPrint
from trimsfs.formats.source import HEADER_LIMIT
from trimsfs.formats.table import FormatError, Tensor
from trimsfs.types import CHUNK_SIZE

SAFETENSORS = ".safetensors"
LEAST_BYTES = 1 << 20
"""Size of the smallest file that gets a fingerprint: what is smaller shares no chunks."""
AT_ONCE = 2
"""Most files that are read at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A file of a version. It has no fingerprint if it is small, or was not read."""

    content: Content
    sha256: str
    fingerprint: Fingerprint | None


async def describe(
    contents: Mapping[str, Content], progress: Callable[[int], None] = lambda _: None
) -> dict[str, Described]:
    """The files with their digests. Those of which the digest is known are not read; *progress* hears of each byte."""
    described: dict[str, Described] = {}
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(path: str, content: Content) -> None:
        async with limiter:
            sha256, fingerprint = await content.sha256(), None
            if sha256 is None:
                sha256, fingerprint = await _read(path, content, progress)
            described[path] = Described(content=content, sha256=sha256, fingerprint=fingerprint)

    async with trio.open_nursery() as nursery:
        for path, content in contents.items():
            nursery.start_soon(one, path, content)
    return dict(sorted(described.items()))


async def _read(path: str, content: Content, progress: Callable[[int], None]) -> tuple[str, Fingerprint | None]:
    digester = await digester_of(path, content)
    for offset in range(0, content.size, CHUNK_SIZE):
        data = await content.read(offset, min(CHUNK_SIZE, content.size - offset))
        await in_thread(digester.update, data)
        progress(len(data))
    return digester.hexdigest(), digester.fingerprint()


async def digester_of(path: str, content: Content) -> "Digester":
    """What digests the bytes of a file."""
    return Digester(content.size, await tensors_of(path, content))


class Digester:
    """Digests the bytes of a file, from the first on in any pieces: the whole, its chunks, and its *tensors*."""

    def __init__(self, size: int, tensors: Sequence[Tensor] = ()) -> None:
        self._size = size
        self._tensors = tensors
        self._crcs = [0] * len(tensors)
        self._first = 0
        """The first tensor that does not end before the bytes that come next."""
        self._offset = 0
        self._whole, self._chunk, self._crc = hashlib.sha256(), hashlib.sha256(), 0
        self._chunks, self._digests = list[int](), bytearray()

    def update(self, data: bytes) -> None:
        """Digest the next bytes."""
        view = memoryview(data)
        self._whole.update(view)
        while view:
            piece = view[: CHUNK_SIZE - self._offset % CHUNK_SIZE]
            self._take(piece)
            view = view[len(piece) :]

    def _take(self, piece: memoryview) -> None:
        """Digest bytes of one chunk."""
        self._chunk.update(piece)
        self._crc = crc32c(piece, self._crc)
        for place in range(self._first, len(self._tensors)):
            begin = self._tensors[place].offset - self._offset
            end = begin + self._tensors[place].nbytes
            if begin >= len(piece):
                break
            self._crcs[place] = crc64nvme(piece[max(0, begin) : min(end, len(piece))], self._crcs[place])
            if end <= len(piece) and place == self._first:
                self._first += 1
        self._offset += len(piece)
        if self._offset % CHUNK_SIZE == 0 or self._offset == self._size:
            self._chunks.append(self._crc)
            self._digests += self._chunk.digest()
            self._chunk, self._crc = hashlib.sha256(), 0

    def hexdigest(self) -> str:
        """The SHA-256 of all bytes so far, in hexadecimal digits."""
        return self._whole.hexdigest()

    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint, once all bytes are digested; None for a small file without tensors."""
        if self._size < LEAST_BYTES and not self._tensors:
            return None
        prints = {one.name: tensor_print(one, crc) for one, crc in zip(self._tensors, self._crcs, strict=True)}
        return Fingerprint(chunks=tuple(self._chunks), tensors=prints, sha256=bytes(self._digests))


def tensor_print(tensor: Tensor, crc64: int | None) -> TensorPrint:
    """The fingerprint of a tensor."""
    return TensorPrint(dtype=tensor.dtype, shape=tensor.shape, offset=tensor.offset, nbytes=tensor.nbytes, crc64=crc64)


async def tensors_of(path: str, content: Content) -> list[Tensor]:
    """The tensors of a safetensors file in the order of their offsets; none of any other file, or a malformed one."""
    if not path.endswith(SAFETENSORS) or content.size < 8:
        return []
    length = 8 + int.from_bytes(await content.read(0, 8), "little")
    if length > min(content.size, HEADER_LIMIT):
        return []
    try:
        return list(safetensors.parse(_Header(await content.read(0, length), content.size)).tensors)
    except FormatError:
        return []


class _Header:
    """A file of which only the beginning is known."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data = data
        self.size = size

    def read(self, offset: int, count: int) -> bytes:
        return self._data[offset : offset + count].ljust(count, b"\0")
