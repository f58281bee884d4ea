"""What the members of a fleet say to each other."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.extras.fleet.protocol import (
    ChunkRequest,
    ProtocolError,
    fleet_token,
    format_crcs,
    parse_crcs,
    parse_holders,
    parse_request,
)
from trimsfs.types import Generation

GENERATION = Generation(key="llama/model.bin", etag='"abc"', size=20 << 20, modified_ns=5)
REQUEST = ChunkRequest(fleet="gpus", token="0" * 64, key="a/b", start=0, stop=1)


def test_a_token_tells_the_content_and_where_it_is_shown() -> None:
    token = fleet_token("gpus", GENERATION, 8 << 20)
    assert token == fleet_token("gpus", replace(GENERATION, modified_ns=6, version_id="v"), 8 << 20)
    assert token == fleet_token("gpus", replace(GENERATION, key="link", linked=GENERATION.key), 8 << 20)
    others = [
        fleet_token("cpus", GENERATION, 8 << 20),
        fleet_token("gpus", GENERATION, 4 << 20),
        *(
            fleet_token("gpus", other, 8 << 20)
            for other in (replace(GENERATION, key="x"), replace(GENERATION, etag="x"), replace(GENERATION, size=1))
        ),
    ]
    assert len({token, *others}) == 6


@given(
    key=st.binary(min_size=1, max_size=200).filter(lambda key: b"\0" not in key),
    start=st.integers(0, 1 << 46),
    length=st.integers(1, 1 << 27),
    cached_only=st.booleans(),
    instance=st.sampled_from(["", "0123456789abcdef"]),
)
def test_a_request_is_parsed_as_it_was_written(
    key: bytes, start: int, length: int, cached_only: bool, instance: str
) -> None:
    request = replace(
        REQUEST,
        key=key.decode(errors="surrogateescape"),
        start=start,
        stop=start + length,
        cached_only=cached_only,
        instance=instance,
    )
    headers = request.headers
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert parse_request(request.target, headers) == request


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/c/gpus/0", {}),
        ("/c/../" + "0" * 64, {}),
        ("/c/gpus/" + "0" * 64 + "/x", {}),
        (REQUEST.target, {"range": ""}),
        (REQUEST.target, {"range": "bytes=5-4"}),
        (REQUEST.target, {"range": "bytes=0-1,3-4"}),
        (REQUEST.target, {"range": "bytes=-4"}),
        (REQUEST.target, {"trimsfs-key": ""}),
        (REQUEST.target, {"trimsfs-key": "a%00b"}),
        (REQUEST.target, {"trimsfs-key": "a" * 5000}),
    ],
)
def test_other_requests_are_refused(target: str, headers: dict[str, str]) -> None:
    with pytest.raises(ProtocolError):
        parse_request(target, {**REQUEST.headers, **headers})


def test_checksums_are_one_for_each_chunk() -> None:
    assert parse_crcs(format_crcs([1, 0xFFFFFFFF])) == [1, 0xFFFFFFFF]
    for value in ("", "1", "0000000g", "00000001,"):
        with pytest.raises(ProtocolError):
            parse_crcs(value)


def test_holders_that_are_no_addresses_are_left_out() -> None:
    assert parse_holders("a:1,[::1]:2,,b c,http://x/") == ["a:1", "[::1]:2"]
