from dataclasses import replace

import pytest

from trimsfs.types import Generation

GENERATION = Generation(key="models/a.bin", etag='"abc"', size=10, modified_ns=5)
STORE = "s3://bucket/"


@pytest.mark.parametrize(
    ("other", "store", "same"),
    [
        (replace(GENERATION, key="models/b.bin"), STORE, False),
        (replace(GENERATION, etag='"abd"'), STORE, False),
        (replace(GENERATION, size=11), STORE, False),
        # Fields that only run together when they are not kept apart.
        (replace(GENERATION, key="models/a.bin\0", etag='"abc"'), STORE, False),
        (GENERATION, "s3://other/", False),
        (replace(GENERATION, version_id="v1", modified_ns=6), STORE, True),
        (replace(GENERATION, key="latest.bin", linked=GENERATION.key), STORE, True),
    ],
)
def test_a_token_is_of_store_and_content(other: Generation, store: str, same: bool) -> None:
    assert (other.token(store) == GENERATION.token(STORE)) == same


def test_a_token_is_32_hexadecimal_digits_whatever_the_key() -> None:
    token = replace(GENERATION, key="\udcff/../ü").token("file:///\udcfe")
    assert len(token) == 32
    assert set(token) <= set("0123456789abcdef")
