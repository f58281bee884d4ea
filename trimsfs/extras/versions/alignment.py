"""Lays safetensors out anew so that tensors begin at multiples of 4 KiB: programs can map those without a copy.

The format allows no holes between tensors, but any order, and spaces after the header. So the header is padded, and
tensors of whole pages come first. The others follow by the power of two that divides their size, the largest first.
"""

import json
from typing import Any

from trimsfs.extras.versions.content import Content, LocalFile
from trimsfs.formats import safetensors
from trimsfs.formats.table import FormatError

PAGE = 4096


class Aligned(Content):
    """A safetensors file of this host in another layout: `header`, and then the tensors' bytes in its order."""

    def __init__(self, file: LocalFile, header: bytes, parts: list[tuple[int, int]]) -> None:
        self._file = file
        self._header = header
        self._parts = parts
        """Offset in the file and length of each tensor."""
        self.size = len(header) + sum(length for _, length in parts)

    async def read(self, offset: int, length: int) -> bytes:
        end = offset + length
        pieces = [self._header[offset:end]]
        start = len(self._header)
        for source, size in self._parts:
            first, last = max(offset, start), min(end, start + size)
            if first < last:
                pieces.append(await self._file.read(source + first - start, last - first))
            start += size
        return b"".join(pieces)


def aligned(file: LocalFile) -> Aligned | LocalFile:
    """A safetensors file with aligned tensors: itself, if they are. Raises FormatError when it is malformed."""
    source = LocalSource(file)
    table = safetensors.parse(source)
    length = int.from_bytes(source.read(0, 8), "little")
    base = 8 + length
    described: dict[str, Any] = json.loads(source.read(8, length))
    if all(tensor.offset % _alignment(tensor.nbytes) == 0 for tensor in table.tensors):
        return file
    order = sorted(table.tensors, key=lambda tensor: (-_alignment(tensor.nbytes), tensor.offset))
    header: dict[str, Any] = {}
    if "__metadata__" in described:
        header["__metadata__"] = described["__metadata__"]
    end = 0
    for tensor in order:
        header[tensor.name] = described[tensor.name] | {"data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    if base + end != file.size:
        raise FormatError("its tensors overlap, or have holes between them")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    parts = [(tensor.offset, tensor.nbytes) for tensor in order if tensor.nbytes]
    return Aligned(file, len(text).to_bytes(8, "little") + text, parts)


def _alignment(nbytes: int) -> int:
    """The largest power of two up to a page that divides a size: what follows such a tensor is aligned as it is."""
    return min(PAGE, nbytes & -nbytes) if nbytes else PAGE


class LocalSource:
    """A file of this host, for a parser."""

    def __init__(self, file: LocalFile) -> None:
        self._file = file
        self.size = file.size

    def read(self, offset: int, length: int) -> bytes:
        """At most *length* bytes from *offset* on."""
        return self._file.read_now(offset, min(length, max(0, self.size - offset)))
