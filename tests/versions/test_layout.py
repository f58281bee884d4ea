"""--align, fingerprints and differences: what they make of safetensors files."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors as reference

from tests.versions.safetensors_files import check_reference_rules, file_of
from trimsfs.extras.versions.alignment import PAGE, aligned
from trimsfs.extras.versions.content import Bytes, Content, LocalFile
from trimsfs.extras.versions.description import describe
from trimsfs.extras.versions.difference import Difference, Version, compare
from trimsfs.formats import fingerprints, safetensors
from trimsfs.formats.fingerprints import Fingerprint
from trimsfs.formats.source import BufferSource
from trimsfs.formats.table import FormatError
from trimsfs.formats.version_records import VersionFile
from trimsfs.types import CHUNK_SIZE

PAGES = {f"layer.{number}": os.urandom(2 * PAGE) for number in range(5)}
ODD = {"bias": os.urandom(6), "norm": os.urandom(64), "empty": b"", "scale": os.urandom(2 * PAGE + 128)}


async def content_of(content: Content) -> bytes:
    """All bytes, read in pieces that cut through tensors."""
    pieces = [await content.read(offset, min(1000, content.size - offset)) for offset in range(0, content.size, 1000)]
    whole = b"".join(pieces)
    assert len(whole) == content.size
    assert await content.read(0, content.size) == whole
    return whole


async def test_tensors_are_aligned_and_keep_their_bytes(tmp_path: Path) -> None:
    tensors = {"bias": ODD["bias"], **PAGES, **ODD}
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(tensors, {"format": "pt"}))
    file = await content_of(aligned(LocalFile(path)))
    path.write_bytes(file)
    assert isinstance(aligned(LocalFile(path)), LocalFile)  # it stays as it is

    check_reference_rules(file)
    library: Any = reference
    assert {name: bytes(tensor["data"]) for name, tensor in library.deserialize(file)} == tensors
    table = safetensors.parse(BufferSource(file))
    assert {one.name: file[one.offset : one.offset + one.nbytes] for one in table.tensors} == tensors
    assert [one.name for one in table.tensors if one.offset % PAGE] == ["norm", "bias"]
    assert all(one.offset % PAGE == 0 for one in table.tensors if one.nbytes % PAGE == 0)
    assert next(one.offset for one in table.tensors if one.name == "norm") % 64 == 0
    length = int.from_bytes(file[:8], "little")
    assert json.loads(file[8 : 8 + length])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, file_of(PAGES)[:-1], file_of(PAGES) + b"more"])
def test_a_malformed_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(damage)
    with pytest.raises(FormatError):
        aligned(LocalFile(path))


class Unread(Bytes):
    """Content of which the digest is not known."""

    sha256 = Content.sha256  # type: ignore[assignment]


async def version_of(files: Mapping[str, bytes]) -> Version:
    described = await describe({path: Bytes(data) for path, data in files.items()})
    read = {path: Unread(data) for path, data in files.items()}
    found = {path: file.fingerprint for path, file in (await describe(read)).items() if file.fingerprint is not None}
    assert fingerprints.parse(fingerprints.encode("v1", found)) == found
    return Version(
        files={
            path: VersionFile(size=len(files[path]), sha256=file.sha256, etag="e") for path, file in described.items()
        },
        fingerprints=found,
    )


def changes(difference: Difference) -> dict[str, str]:
    return {one.name: one.change for one in difference.tensors}


async def test_versions_differ_by_tensor() -> None:
    before = {"model.safetensors": file_of({**PAGES, "old": b"1"}), "config.json": b"{}"}
    after = {"model.safetensors": file_of({**PAGES, "layer.1": b"2" * 2 * PAGE, "new": b"123"}), "more.json": b"[]"}
    difference = compare(await version_of(before), await version_of(after))

    assert {one.name: one.change for one in difference.files} == {
        "config.json": "removed",
        "model.safetensors": "changed",
        "more.json": "added",
    }
    expected = {f"layer.{number}": "equal" for number in range(5)} | {"layer.1": "changed", "new": "added"}
    assert changes(difference) == {**expected, "old": "removed"}
    assert difference.fetched_bytes == sum(map(len, after.values()))
    assert difference.different_bytes == difference.fetched_bytes - 4 * 2 * PAGE


async def test_a_tensor_that_moves_to_another_file_is_equal() -> None:
    before = {"one.safetensors": file_of(PAGES)}
    after = {
        "a.safetensors": file_of({"layer.0": PAGES["layer.0"]}),
        "b.safetensors": file_of(PAGES | {"layer.0": b""}),
    }
    difference = compare(await version_of(before), await version_of({**after, "b.safetensors": file_of(PAGES)}))
    assert set(changes(difference).values()) == {"equal"}


async def test_tensors_that_nobody_read_are_compared_by_their_descriptions_only() -> None:
    first = await version_of({"m.safetensors": file_of(PAGES | {"layer.0": b"1"})})
    second = await version_of({"m.safetensors": file_of(PAGES | {"layer.0": b"2"})})
    tensors = second.fingerprints["m.safetensors"].tensors
    unread = Fingerprint(chunks=(), tensors={name: replace(one, crc64=None) for name, one in tensors.items()})
    difference = compare(first, Version(files=second.files, fingerprints={"m.safetensors": unread}))
    assert set(changes(difference).values()) == {"unknown"}
    assert difference.different_bytes == difference.fetched_bytes


async def test_shared_bytes_are_equal_chunks_and_equal_tensors_in_place() -> None:
    """As `trimsfs.tiers.deduplication` shares them."""
    common, other = os.urandom(CHUNK_SIZE), os.urandom(CHUNK_SIZE)
    first = await version_of({"a.bin": common + other + b"end", "small": b"x"})
    second = await version_of({"a.bin": other + common + b"END", "small": b"x"})
    assert compare(first, second).shared_bytes == 2 * CHUNK_SIZE
    assert compare(first, first).shared_bytes == 2 * CHUNK_SIZE + 3

    big = {f"t{number}": os.urandom(1 << 20) for number in range(4)}
    one, two = file_of(big), file_of(big | {"t2": os.urandom(1 << 20)})
    shared = compare(await version_of({"m.safetensors": one}), await version_of({"m.safetensors": two})).shared_bytes
    assert shared is not None
    assert 3 * ((1 << 20) - 2 * PAGE) <= shared <= 3 << 20


async def test_shared_bytes_are_unknown_without_fingerprints() -> None:
    first = await version_of({"a.bin": b"x" * (2 << 20)})
    second = Version(files=first.files, fingerprints={})
    assert compare(first, second).shared_bytes is None
    assert compare(second, first).shared_bytes is None


@pytest.mark.parametrize(
    "files",
    [
        {"a": 1},
        {"a": {"chunks": "0", "tensors": {}}},
        {"a": {"chunks": "", "tensors": {"t": ["U8", [1], 0, 1]}}},
        {"a": {"chunks": "", "tensors": {"t": ["U8", ["1"], 0, 1, "0" * 16]}}},
        {"../a": {"chunks": "", "tensors": {}}},
    ],
)
def test_malformed_fingerprints_are_refused(files: object) -> None:
    with pytest.raises(FormatError):
        fingerprints.parse(json.dumps({"format": 1, "version": "v1", "files": files}).encode())
