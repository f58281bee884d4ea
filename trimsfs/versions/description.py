"""Describes the files of a version before it is published: their SHA-256s and fingerprints, from one reading."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from trimsfs.checksums import crc32c, crc64nvme
from trimsfs.formats import safetensors
from trimsfs.formats.fingerprints import Fingerprint, TensorPrint
from trimsfs.formats.source import HEADER_LIMIT
from trimsfs.formats.table import FormatError, Tensor
from trimsfs.types import CHUNK_SIZE
from trimsfs.versions.content import Content

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
    found: dict[str, Described] = {}
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(path: str, content: Content) -> None:
        async with limiter:
            sha256, fingerprint = await content.sha256(), None
            if sha256 is None:
                sha256, fingerprint = await _read(path, content, progress)
            found[path] = Described(content=content, sha256=sha256, fingerprint=fingerprint)

    async with trio.open_nursery() as nursery:
        for path, content in contents.items():
            nursery.start_soon(one, path, content)
    return dict(sorted(found.items()))


async def _read(path: str, content: Content, progress: Callable[[int], None]) -> tuple[str, Fingerprint | None]:
    whole, digests = hashlib.sha256(), bytearray()
    chunks: list[int] = []
    tensors = await tensors_of(path, content)
    crcs = [0] * len(tensors)
    first = 0  # the first tensor that does not end before this chunk

    def take(data: bytes, offset: int) -> None:
        nonlocal first
        whole.update(data)
        digests.extend(hashlib.sha256(data).digest())
        chunks.append(crc32c(data))
        view = memoryview(data)
        for place in range(first, len(tensors)):
            begin = tensors[place].offset - offset
            end = begin + tensors[place].nbytes
            if begin >= len(data):
                break
            crcs[place] = crc64nvme(view[max(0, begin) : min(end, len(data))], crcs[place])
            if end <= len(data) and place == first:
                first += 1

    for offset in range(0, content.size, CHUNK_SIZE):
        data = await content.read(offset, min(CHUNK_SIZE, content.size - offset))
        await trio.to_thread.run_sync(take, data, offset)
        progress(len(data))
    if content.size < LEAST_BYTES and not tensors:
        return whole.hexdigest(), None
    prints = {one.name: tensor_print(one, crc) for one, crc in zip(tensors, crcs, strict=True)}
    return whole.hexdigest(), Fingerprint(chunks=tuple(chunks), tensors=prints, sha256=bytes(digests))


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
