"""Fingerprints of a version's files, by which versions are compared, and equal chunks found, without reading files.

CRCs say where equal bytes may be: equal bytes have equal ones, and different bytes practically never. SHA-256s of the
chunks prove it. No I/O here.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from trimsfs.formats import version_records
from trimsfs.formats.table import FormatError

DIGEST_BYTES = 32
"""Bytes of a SHA-256."""
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
    """The CRC32C of each chunk of a file, the last one shorter, and its tensors by name.

    ``sha256`` is the SHA-256s of the chunks, one after the other; empty if they were not computed.
    """

    chunks: tuple[int, ...]
    tensors: Mapping[str, TensorPrint]
    sha256: bytes = b""

    def digest(self, chunk: int) -> bytes:
        """The SHA-256 of a chunk; empty if it is not known."""
        return self.sha256[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES]


def encode(version: str, files: Mapping[str, Fingerprint]) -> bytes:
    """The object in the store: fingerprints of the files that have one, by path."""
    described = {
        path: {
            "chunks": "".join(f"{crc:08x}" for crc in file.chunks),
            "sha256": base64.b64encode(file.sha256).decode(),
            "tensors": {
                name: [one.dtype, list(one.shape), one.offset, one.nbytes, f"{one.crc64 or 0:016x}"]
                for name, one in file.tensors.items()
            },
        }
        for path, file in sorted(files.items())
    }
    return version_records.encoded({"version": version, "files": described}, indent=None)


def parse(data: bytes) -> dict[str, Fingerprint]:
    """Raises FormatError."""
    files = version_records.get(version_records.fields_of(data), "files", dict)
    return {version_records.check_path(path): _file(entry) for path, entry in files.items()}


def _file(entry: object) -> Fingerprint:
    match entry:
        case {"chunks": str(chunks), "tensors": dict(tensors), **rest} if _CHUNKS.fullmatch(chunks):
            crcs = tuple(int(chunks[start : start + 8], 16) for start in range(0, len(chunks), 8))
            prints = {name: _tensor(one) for name, one in tensors.items()}
            return Fingerprint(chunks=crcs, tensors=prints, sha256=_digests(rest.get("sha256", ""), len(crcs)))
    raise FormatError("a fingerprint is incomplete or invalid")


def _digests(value: object, count: int) -> bytes:
    """The SHA-256s of *count* chunks; none in a version that an older trimsfs has pushed."""
    with suppress(binascii.Error):
        if isinstance(value, str) and len(data := base64.b64decode(value, validate=True)) in (0, count * DIGEST_BYTES):
            return data
    raise FormatError("the SHA-256s of a fingerprint are invalid")


def _tensor(entry: object) -> TensorPrint:
    match entry:
        case [str(dtype), [*shape], int(offset), int(nbytes), str(crc)] if _TENSOR.fullmatch(crc) and offset >= 0:
            sizes = tuple(size for size in shape if isinstance(size, int))
            if nbytes >= 0 and len(sizes) == len(shape):
                return TensorPrint(dtype=dtype, shape=sizes, offset=offset, nbytes=nbytes, crc64=int(crc, 16))
    raise FormatError("the fingerprint of a tensor is invalid")
