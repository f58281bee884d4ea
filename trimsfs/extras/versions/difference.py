"""Compares two versions: by file from their manifests, by tensor and chunk from their fingerprints. No I/O."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from trimsfs.formats.fingerprints import Fingerprint, TensorPrint
from trimsfs.formats.version_records import VersionFile
from trimsfs.types import CHUNK_SIZE

T = TypeVar("T")

Change = Literal["equal", "changed", "added", "removed", "unknown"]
"""What became of a file or tensor; of a tensor, it is unknown if one of its files has no fingerprint."""

BLOCK = 4096
"""Bytes of the blocks that a file system can share, as `trimsfs.tiers.extents` does."""
LEAST_BYTES = 1 << 20
"""Size of the smallest file of which the server shares blocks, as in `trimsfs.tiers.deduplication`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version as it is compared: files by path, and the fingerprints of those that have one."""

    files: Mapping[str, VersionFile]
    fingerprints: Mapping[str, Fingerprint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A file or tensor by name, how it differs, and its bytes: in the second version, if it is there."""

    name: str
    change: Change
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a second version differs from a first.

    A host that has the first version whole and loads the second fetches ``fetched_bytes``. Of them,
    ``different_bytes`` are in no equal file, nor in an equal tensor. With ``--share-chunks``, it fetches
    ``missing_bytes``, and ``shared_bytes`` take no space of their own in its cache; None if a large file has no
    fingerprint.
    """

    files: tuple[Changed, ...]
    tensors: tuple[Changed, ...]
    fetched_bytes: int
    different_bytes: int
    missing_bytes: int
    shared_bytes: int | None


def compare(first: Version, second: Version) -> Difference:
    """The difference of two versions of a model."""
    before = {file.sha256 for file in first.files.values()}
    new = {path: file for path, file in second.files.items() if file.sha256 not in before}
    known = sum(_equal_tensor_bytes(first, second, path) for path in new)
    return Difference(
        files=tuple(_changes(first.files, second.files, lambda file: file.size, _file_change)),
        tensors=tuple(_changes(_by_name(first), _by_name(second), lambda each: each[1].nbytes, _tensor_change)),
        fetched_bytes=sum(file.size for file in second.files.values()),
        different_bytes=sum(file.size for file in new.values()) - known,
        missing_bytes=_missing(first, second),
        shared_bytes=_shared(first, second),
    )


def _changes(
    first: Mapping[str, T], second: Mapping[str, T], nbytes: Callable[[T], int], change: Callable[[T, T], Change]
) -> Iterator[Changed]:
    """What became of each name; *change* tells of one that both versions have."""
    for name in sorted({*first, *second}):
        if name not in second:
            yield Changed(name=name, change="removed", nbytes=nbytes(first[name]))
        else:
            became = change(first[name], second[name]) if name in first else "added"
            yield Changed(name=name, change=became, nbytes=nbytes(second[name]))


def _file_change(before: VersionFile, after: VersionFile) -> Change:
    return "equal" if before.sha256 == after.sha256 else "changed"


def _tensor_change(one: tuple[VersionFile, TensorPrint], other: tuple[VersionFile, TensorPrint]) -> Change:
    (file, before), (other_file, after) = one, other
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return "changed"
    if file.sha256 == other_file.sha256:
        return "equal"
    if before.crc64 is None or after.crc64 is None:
        return "unknown"
    return "equal" if before.crc64 == after.crc64 else "changed"


def _by_name(version: Version) -> dict[str, tuple[VersionFile, TensorPrint]]:
    """The file and fingerprint of each tensor, in whatever file it is; a name that two files have counts once."""
    return {
        name: (version.files[path], tensor)
        for path, fingerprint in version.fingerprints.items()
        if path in version.files
        for name, tensor in fingerprint.tensors.items()
    }


def _equal_tensor_bytes(first: Version, second: Version, path: str) -> int:
    """Bytes of a file of the second version that are tensors of the first."""
    fingerprint = second.fingerprints.get(path)
    if fingerprint is None:
        return 0
    before = {
        (tensor.crc64, tensor.nbytes)
        for one in first.fingerprints.values()
        for tensor in one.tensors.values()
        if tensor.crc64 is not None
    }
    return sum(one.nbytes for one in fingerprint.tensors.values() if (one.crc64, one.nbytes) in before)


def _missing(first: Version, second: Version) -> int:
    """Bytes of the second version in chunks that are in no file of the first, as far as SHA-256s tell."""
    whole = {(file.sha256, file.size) for file in first.files.values()}
    chunks = {chunk for path in first.files for chunk in _digests(first, path)}
    total = 0
    for path, file in second.files.items():
        if (file.sha256, file.size) not in whole:
            known = sum(length for digest, length in _digests(second, path) if (digest, length) in chunks)
            total += file.size - known
    return total


def _digests(version: Version, path: str) -> Iterator[tuple[bytes, int]]:
    """The SHA-256 and length of each chunk of a file; none if the version does not tell them."""
    fingerprint = version.fingerprints.get(path)
    if fingerprint is not None and fingerprint.sha256:
        for number, (_, length) in enumerate(_chunks(fingerprint, version.files[path].size)):
            yield fingerprint.digest(number), length


def _shared(first: Version, second: Version) -> int | None:
    """Bytes that a cache shares with the first version: equal chunks anywhere, and equal tensors in the same place."""
    for version in (first, second):
        large = [path for path, file in version.files.items() if file.size >= LEAST_BYTES]
        if not all(path in version.fingerprints and version.fingerprints[path].chunks for path in large):
            return None
    chunks: set[tuple[int, int]] = set()
    for path, file in first.files.items():
        if file.size >= LEAST_BYTES:
            chunks |= {*_chunks(first.fingerprints[path], file.size)}
    total = 0
    for path, file in second.files.items():
        if file.size < LEAST_BYTES:
            continue
        fingerprint = second.fingerprints[path]
        sizes = list(_chunks(fingerprint, file.size))
        alone = {number for number, chunk in enumerate(sizes) if chunk not in chunks}
        total += sum(length for number, (_, length) in enumerate(sizes) if number not in alone)
        before = first.fingerprints.get(path)
        if (
            path in first.files
            and before is not None
            and (len(alone) < len(sizes) or first.files[path].size == file.size)
        ):
            total += _in_place(before, fingerprint, alone)
    return total


def _chunks(fingerprint: Fingerprint, size: int) -> Iterator[tuple[int, int]]:
    """The CRC and length of each chunk."""
    for number, crc in enumerate(fingerprint.chunks):
        yield crc, min(CHUNK_SIZE, size - number * CHUNK_SIZE)


def _in_place(before: Fingerprint, after: Fingerprint, alone: set[int]) -> int:
    """Bytes of whole blocks in the chunks *alone* that are of tensors which are equal at the same place."""
    total = 0
    for name, tensor in after.tensors.items():
        other = before.tensors.get(name)
        if other is None or other.crc64 is None or tensor.crc64 is None:
            continue
        if (other.offset, other.nbytes, other.crc64) != (tensor.offset, tensor.nbytes, tensor.crc64):
            continue
        begin, end = -(-tensor.offset // BLOCK) * BLOCK, (tensor.offset + tensor.nbytes) // BLOCK * BLOCK
        while begin < end:
            limit = min(end, (begin // CHUNK_SIZE + 1) * CHUNK_SIZE)
            total += limit - begin if begin // CHUNK_SIZE in alone else 0
            begin = limit
    return total
