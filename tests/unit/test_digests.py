"""Digests of whole objects."""

import base64
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crc32c
import pytest
from awscrt import checksums
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.stores import digests
from trimsfs.stores.digests import MIB, Algorithm, Digest, compute, crc32c_of
from trimsfs.stores.s3.object_digests import digest_by_etag, digest_of
from trimsfs.tiers.host.page_cache import resident_bytes
from trimsfs.types import ChunkRecord

CONTENT = os.urandom(3 * MIB + 12345)
BY_HAND: dict[Algorithm, bytes] = {
    "crc32": checksums.crc32(CONTENT).to_bytes(4),
    "crc32c": crc32c.crc32c(CONTENT).to_bytes(4),
    "crc64nvme": checksums.crc64nvme(CONTENT).to_bytes(8),
    "md5": hashlib.md5(CONTENT).digest(),
    "sha1": hashlib.sha1(CONTENT).digest(),
    "sha256": hashlib.sha256(CONTENT).digest(),
}


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    (tmp_path / "file").write_bytes(CONTENT + b"more")
    return os.open(tmp_path / "file", os.O_RDONLY)


@pytest.mark.parametrize("algorithm", BY_HAND)
def test_a_digest_of_all_bytes(descriptor: int, algorithm: Algorithm) -> None:
    assert compute(descriptor, len(CONTENT), algorithm, 0) == BY_HAND[algorithm]


def test_the_id_that_git_gives_a_file(descriptor: int) -> None:
    for size in (0, 5, len(CONTENT)):
        git = subprocess.run(["git", "hash-object", "--stdin"], input=CONTENT[:size], capture_output=True, check=True)
        found = compute(descriptor, size, "git-sha1", 0)
        assert found is not None
        assert found.hex() == git.stdout.decode().strip()
    assert Digest(algorithm="git-sha1", value=b"").of_nothing.hex() == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@pytest.mark.parametrize(("algorithm", "function"), [("md5", hashlib.md5), ("sha256", hashlib.sha256)])
@pytest.mark.parametrize("part_size", [1000 * 1000, MIB, len(CONTENT), 2 * len(CONTENT)])
def test_a_digest_of_parts(descriptor: int, algorithm: Algorithm, function: Any, part_size: int) -> None:
    parts = [CONTENT[start : start + part_size] for start in range(0, len(CONTENT), part_size)]
    by_hand = function(b"".join(function(part).digest() for part in parts)).digest()
    assert compute(descriptor, len(CONTENT), algorithm, part_size) == by_hand


@pytest.mark.parametrize("part_size", [64, 64 * 1000, MIB // 16, MIB // 2, 100_001])
@pytest.mark.parametrize("size", [0, 6 * (MIB // 2), 40 * 64 + 1, len(CONTENT)])
def test_parts_side_by_side(descriptor: int, part_size: int, size: int) -> None:
    parts = [CONTENT[start : min(size, start + part_size)] for start in range(0, max(1, size), part_size)]
    by_hand = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).digest()
    assert compute(descriptor, size, "md5", part_size) == by_hand


def test_parts_side_by_side_on_any_processor(descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled without AVX2, and without a warning."""
    library = tmp_path / f"_md5{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-O1", "-DPORTABLE", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-psabi", "-fPIC", "-shared"]
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(["gcc", *flags, include, Path(digests.__file__).with_name("_md5.c"), "-o", library], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_md5", str(library))
    specification = importlib.util.spec_from_loader("_md5", loader)
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    loader.exec_module(module)
    by_hand = compute(descriptor, len(CONTENT), "md5", MIB // 16)
    used: list[int] = []

    def update(state: bytearray, data: memoryview) -> None:
        used.append(len(data))
        module.update(state, data)

    monkeypatch.setattr(digests, "_md5", SimpleNamespace(update=update))
    assert compute(descriptor, len(CONTENT), "md5", MIB // 16) == by_hand
    assert used
    for state, data in ((bytearray(255), bytes(1024)), (bytearray(256), bytes(1000))):
        with pytest.raises(ValueError, match="256 bytes"):
            module.update(state, data)


def test_parts_without_the_extension(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand = compute(descriptor, len(CONTENT), "md5", MIB // 16)
    monkeypatch.setattr(digests, "LANES", 0)
    assert compute(descriptor, len(CONTENT), "md5", MIB // 16) == by_hand


def test_a_digest_brings_nothing_into_the_page_cache_and_takes_nothing_out(descriptor: int) -> None:
    if not _reads_uncached(descriptor):
        pytest.skip("the kernel or the file system cannot read past the page cache")
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.preadv(descriptor, [bytearray(MIB)], 2 * MIB, digests.RWF_DONTCACHE)
    assert resident_bytes(descriptor) == 0
    assert compute(descriptor, len(CONTENT), "md5", 0) == BY_HAND["md5"]
    assert resident_bytes(descriptor) == 0
    os.pread(descriptor, len(CONTENT), 0)
    before = resident_bytes(descriptor)
    assert compute(descriptor, len(CONTENT), "md5", 0) == BY_HAND["md5"]
    assert resident_bytes(descriptor) == before


def _reads_uncached(descriptor: int) -> bool:
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], 0, digests.RWF_DONTCACHE))
    except OSError:
        return False


@pytest.mark.parametrize("part_size", [0, MIB // 4, MIB])
def test_a_file_that_ends_before_has_none(descriptor: int, part_size: int) -> None:
    assert compute(descriptor, len(CONTENT) + 5, "md5", part_size) is None


def test_the_checksum_of_the_polynomial_is_what_s3_calls_so() -> None:
    """As its documentation has it, and the specification of NVM Express."""
    assert checksums.crc64nvme(b"123456789") == 0xAE8B14860A799888


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8))
def test_checksums_of_chunks_make_up_that_of_all(pieces: list[bytes]) -> None:
    chunks = [
        ChunkRecord(chunk=number, length=len(piece), crc=crc32c.crc32c(piece)) for number, piece in enumerate(pieces)
    ]
    assert crc32c_of(chunks) == crc32c.crc32c(b"".join(pieces)).to_bytes(4)


# What S3 tells


def head(headers: Mapping[str, str] | None = None) -> dict[str, str]:
    return {"etag": '"0123456789abcdef0123456789abcdef"', **(headers or {})}


@pytest.mark.parametrize("algorithm", [name for name in BY_HAND if name != "md5"])
@pytest.mark.parametrize("parts", [0, 17])
def test_a_checksum_of_the_object(algorithm: Algorithm, parts: int) -> None:
    told = base64.b64encode(BY_HAND[algorithm]).decode() + (f"-{parts}" if parts else "")
    digest = Digest(algorithm=algorithm, value=BY_HAND[algorithm], parts=parts)
    assert digest_of(head({f"x-amz-checksum-{algorithm}": told})) == digest


def test_what_costs_least_is_taken() -> None:
    told = {f"x-amz-checksum-{name}": base64.b64encode(value).decode() for name, value in BY_HAND.items()}
    digest = digest_of(head(told))
    assert digest is not None
    assert (digest.algorithm, digest.at_once) == ("crc64nvme", True)


@pytest.mark.parametrize(
    "told", ["", "no base64!", "AAA", "AAAA-x", "AAAA-", "AAAA--5", "AAAA-0", "AAAA-100000", "AA=="]
)
def test_a_checksum_that_is_none(told: str) -> None:
    assert digest_of(head({"x-amz-checksum-sha256": told})) is None


def test_an_etag_is_most_likely_a_digest() -> None:
    value = bytes.fromhex("0123456789abcdef0123456789abcdef")
    whole = Digest(algorithm="md5", value=value, certain=False)
    assert digest_by_etag('"0123456789abcdef0123456789abcdef"') == digest_of(head()) == whole
    parts = Digest(algorithm="md5", value=value, parts=3, certain=False)
    assert digest_by_etag('"0123456789abcdef0123456789abcdef-3"') == parts


@pytest.mark.parametrize("etag", ['"x"', "", '"0123456789ABCDEF"', '"0123456789abcdef0123456789abcdef-0"', "a" * 40])
def test_an_etag_that_is_none(etag: str) -> None:
    assert digest_by_etag(etag) is None


@pytest.mark.parametrize(
    "encrypted",
    [{"x-amz-server-side-encryption": "aws:kms"}, {"x-amz-server-side-encryption-customer-algorithm": "AES256"}],
)
def test_the_etag_of_what_is_encrypted_by_a_key_is_none(encrypted: dict[str, str]) -> None:
    assert digest_of(head(encrypted)) is None


@pytest.mark.parametrize(
    ("size", "parts", "expected"),
    [
        (20 * MIB, 3, [8 * MIB, 7 * MIB]),
        (20 * MIB, 2, [16 * MIB, 10 * MIB, 15 * MIB]),
        (100 * MIB, 7, [16 * MIB, 15 * MIB]),
        (1000 * MIB, 3, [334 * MIB]),
        (10, 2, []),
    ],
)
def test_sizes_of_parts_are_guessed(size: int, parts: int, expected: list[int]) -> None:
    digest = Digest(algorithm="md5", value=b"", parts=parts)
    assert digest.part_sizes(size) == expected
    assert Digest(algorithm="md5", value=b"", parts=parts, part_size=7).part_sizes(size) == [7]
