"""Checksums are the standard ones, whatever library computes them: caches on disks hold them."""

import random

import crc32c as other
import pytest

from trimsfs.checksums import Crc, combine_crc32c, crc32, crc32c, crc64nvme


@pytest.mark.parametrize(
    ("function", "expected"), [(crc32, 0xCBF43926), (crc32c, 0xE3069283), (crc64nvme, 0xAE8B14860A799888)]
)
def test_the_check_values_of_the_standards(function: Crc, expected: int) -> None:
    assert function(b"123456789") == expected
    assert function(memoryview(b"6789"), function(b"12345")) == expected
    assert function(b"") == 0


@pytest.mark.parametrize("size", [1, 7, 4096, 262_147, 3 << 20])
def test_another_library_gives_the_same_crc32c(size: int) -> None:
    content = random.Random(size).randbytes(size)
    half = size // 2
    assert crc32c(content) == other.crc32c(content)
    assert combine_crc32c(crc32c(content[:half]), crc32c(content[half:]), size - half) == other.crc32c(content)
