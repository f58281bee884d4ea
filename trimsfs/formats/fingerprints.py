"""Fingerprints of a version's files, by which two versions are compared without reading them.

They are CRCs: equal bytes have equal ones, and different bytes practically never. They prove nothing to those who do
not trust the publisher; the SHA-256 in the manifest does. No I/O here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trimsfs.formats import versions
from trimsfs.formats.table import FormatError

_CHUNKS = re.compile(r"(?:[0-9a-f]{8})*")
_TENSOR = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPrint:
    """A tensor's place in its file, and the CRC-64/NVME of its bytes; None if they were not read."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    crc64: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The CRC32C of each chunk of a file, the last one shorter, and its tensors by name."""

    chunks: tuple[int, ...]
    tensors: Mapping[str, TensorPrint]


def encode(version: str, files: Mapping[str, Fingerprint]) -> bytes:
    """The object in the store: fingerprints of the files that have one, by path."""
    described = {
        path: {
            "chunks": "".join(f"{crc:08x}" for crc in file.chunks),
            "tensors": {
                name: [one.dtype, list(one.shape), one.offset, one.nbytes, f"{one.crc64 or 0:016x}"]
                for name, one in file.tensors.items()
            },
        }
        for path, file in sorted(files.items())
    }
    return versions.encoded({"version": version, "files": described}, indent=None)


def parse(data: bytes) -> dict[str, Fingerprint]:
    """Raises FormatError."""
    files = versions.get(versions.fields_of(data), "files", dict)
    return {versions.check_path(path): _file(entry) for path, entry in files.items()}


def _file(entry: object) -> Fingerprint:
    match entry:
        case {"chunks": str(chunks), "tensors": dict(tensors)} if _CHUNKS.fullmatch(chunks):
            crcs = tuple(int(chunks[start : start + 8], 16) for start in range(0, len(chunks), 8))
            return Fingerprint(chunks=crcs, tensors={name: _tensor(one) for name, one in tensors.items()})
    raise FormatError("a fingerprint is incomplete or invalid")


def _tensor(entry: object) -> TensorPrint:
    match entry:
        case [str(dtype), [*shape], int(offset), int(nbytes), str(crc)] if _TENSOR.fullmatch(crc) and offset >= 0:
            sizes = tuple(size for size in shape if isinstance(size, int))
            if nbytes >= 0 and len(sizes) == len(shape):
                return TensorPrint(dtype=dtype, shape=sizes, offset=offset, nbytes=nbytes, crc64=int(crc, 16))
    raise FormatError("the fingerprint of a tensor is invalid")
