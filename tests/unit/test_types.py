from dataclasses import replace

import pytest

from trimsfs.types import Generation

GENERATION = Generation(key="models/a.bin", etag='"abc"', size=10, modified_ns=5)


@pytest.mark.parametrize(
    "other",
    [
        replace(GENERATION, key="models/b.bin"),
        replace(GENERATION, etag='"abd"'),
        replace(GENERATION, size=11),
        # Fields that only run together when they are not kept apart.
        replace(GENERATION, key="models/a.bin\0", etag='"abc"'),
    ],
)
def test_another_content_has_another_token(other: Generation) -> None:
    assert other.token("s3://bucket/") != GENERATION.token("s3://bucket/")


def test_another_store_has_another_token() -> None:
    assert GENERATION.token("s3://bucket/") != GENERATION.token("s3://other/")


def test_version_and_time_are_no_part_of_the_identity() -> None:
    same = replace(GENERATION, version_id="v1", modified_ns=6)
    assert same.token("s3://bucket/") == GENERATION.token("s3://bucket/")


def test_a_link_has_the_token_of_its_file() -> None:
    link = replace(GENERATION, key="latest.bin", linked=GENERATION.key)
    assert link.token("s3://bucket/") == GENERATION.token("s3://bucket/")


def test_a_token_is_32_hexadecimal_digits_whatever_the_key() -> None:
    token = replace(GENERATION, key="\udcff/../ü").token("file:///\udcfe")
    assert len(token) == 32
    assert set(token) <= set("0123456789abcdef")
