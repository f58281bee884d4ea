"""A store makes the requests that the SDK would, though it seldom asks the SDK."""

import dataclasses
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.contract.backends import MAX_REQUESTS, read, s3_options, use_only
from tests.contract.clouds import s3_error
from tests.contract.raw_server import Answer, RawServer, raw_server, respond
from tests.services import S3Server
from tests.support.http_server import Server
from trimsfs.errors import ObjectNotFoundError, StoreAccessError
from trimsfs.options import MountOptions
from trimsfs.stores.s3 import S3Store
from trimsfs.types import Generation

CONTENT = b"weights"
LARGE = 1 << 20
ETAG = '"right"'
PART = respond(
    "206 Partial Content",
    CONTENT,
    headers={"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}", "ETag": ETAG},
)
HEAD = respond("200 OK", b"", length=7, headers={"ETag": ETAG, "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"})
KEYS = [
    *("plain", "dir/model", "a b", " ", "a+b", "100%", "%41", "%2F", "a//b", "/leading", "//", "trailing/", "/"),
    *("..", "../up", "a/../b", "a/./b", ".", "~tilde-._", "what?no#1&x=y;z", "a:b@c", "a\\b", "tab\tline\nend\r"),
    *("quotes\"'", "<&>", "ünïcödé", "模型/权重", "🤗", "e\u0301", "\x01", "x" * 1000),
]


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of a session; tests with a real server replace them."""
    use_only(S3Server("http://127.0.0.1:1", "AKIDEXAMPLE", "secret"), monkeypatch)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session/token==")


class Watched:
    """A store, and how many calls of the SDK it has made."""

    def __init__(self, options: MountOptions) -> None:
        bucket, _, prefix = (options.store or "").removeprefix("s3://").partition("/")
        self.store = S3Store(bucket, prefix, options, max_requests=MAX_REQUESTS)
        self.sdk_calls = 0
        self.store._client.meta.events.register("provide-client-params.s3", self._count)

    def _count(self, **_: object) -> None:
        self.sdk_calls += 1


@asynccontextmanager
async def watched(options: MountOptions) -> AsyncIterator[Watched]:
    store = Watched(options)
    try:
        yield store
    finally:
        await store.store.aclose()


def generation(key: str, *, etag: str = ETAG, version_id: str | None = None) -> Generation:
    return Generation(key=key, etag=etag, size=len(CONTENT), modified_ns=0, version_id=version_id)


def parsed(request: bytes) -> tuple[str, dict[str, str]]:
    """The first line of a request, and its headers without what names this one request."""
    line, *headers = request.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    told = {name.lower(): value for name, _, value in (header.partition(": ") for header in headers)}
    assert len(told) == len(headers)
    invocation = told.pop("amz-sdk-invocation-id")
    assert len(invocation) == 36
    return line, told


async def both_ways(server: RawServer, options: MountOptions, *keys: Generation) -> None:
    """Read objects, each by a store of its own, whose only request is the SDK's, and by one that copies its first."""
    by_sdk = []
    for key in keys:
        async with watched(options) as alone:
            assert await read(alone.store, key) == CONTENT
            assert alone.sdk_calls == 1
        by_sdk.append(parsed(server.requests[-1]))
    async with watched(options) as one:
        await read(one.store, generation("first"))
        del server.requests[:]
        for key in keys:
            assert await read(one.store, key) == CONTENT
        assert one.sdk_calls == 1
    assert [parsed(request) for request in server.requests] == by_sdk


@pytest.mark.usefixtures("frozen_clock")
@pytest.mark.parametrize("key", KEYS)
async def test_key_is_asked_for_as_the_sdk_does(key: str) -> None:
    async with raw_server(PART) as server:
        await both_ways(server, s3_options(server.endpoint_url, "bucket"), generation(key))


@pytest.mark.promise("conditional ranged read", on="s3")
@pytest.mark.usefixtures("frozen_clock")
async def test_condition_is_that_of_the_sdk() -> None:
    async with raw_server(PART) as server:
        keys = [generation("model", version_id=version) for version in ("v7", "a b/+=&?", "null", "ü")]
        await both_ways(server, s3_options(server.endpoint_url, "bucket"), *keys)
    line, headers = parsed(server.requests[0])
    assert line == "GET /bucket/model?versionId=v7 HTTP/1.1"
    assert (headers["if-match"], headers["range"]) == (ETAG, "bytes=0-6")


@pytest.mark.usefixtures("frozen_clock")
@pytest.mark.parametrize("etag", ['W/"weak"', "bare", '"two  spaces"', '"ünï"', "", '"a,b"'])
async def test_etag_is_sent_as_the_sdk_sends_it(etag: str) -> None:
    answer = respond(
        "206 Partial Content", CONTENT, headers={"Content-Range": f"bytes 0-6/{len(CONTENT)}", "ETag": ETAG}
    )
    requests = []
    async with raw_server(answer) as server:
        for before in ([], [generation("model")]):
            async with watched(s3_options(server.endpoint_url, "bucket")) as one:
                for first in before:
                    await read(one.store, first)
                with pytest.raises(Exception, match="ETag"):
                    await read(one.store, generation("model", etag=etag))
                assert one.sdk_calls == 1
            requests.append(parsed(server.requests[-1]))
    assert requests[0] == requests[1]


@pytest.mark.usefixtures("frozen_clock")
@pytest.mark.parametrize("path", ["", "/", "/base", "/base/", "/a%20b/c"])
@pytest.mark.parametrize("prefix", ["", "some/prefix", "50% ü"])
async def test_endpoint_may_have_a_path_and_the_store_a_prefix(path: str, prefix: str) -> None:
    async with raw_server(PART) as server:
        options = s3_options(server.endpoint_url + path, "bucket", prefix)
        await both_ways(server, options, *map(generation, ("model", "/a b")))


@pytest.mark.usefixtures("frozen_clock")
@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"anonymous": True}, id="anonymous"),
        pytest.param({"region": "eu-west-1"}, id="region"),
        pytest.param({"endpoint_url": None, "addressing_style": "virtual", "region": "eu-west-1"}, id="AWS"),
        pytest.param({"endpoint_url": "http://s3.example.com", "addressing_style": "virtual"}, id="virtual"),
        pytest.param({"endpoint_url": "http://s3.example.com/base", "addressing_style": "auto"}, id="automatic"),
    ],
)
async def test_options_lead_to_the_requests_of_the_sdk(
    changed: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with raw_server(PART) as server:
        options = s3_options(server.endpoint_url, "bucket")
        if "endpoint_url" in changed:
            monkeypatch.setenv("HTTP_PROXY", server.endpoint_url)  # so that any name leads here
        if changed.get("endpoint_url", "") is None:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.eu-west-1.amazonaws.com")
        await both_ways(server, options.model_copy(update=changed), *map(generation, ("model", "a b")))
        line, headers = parsed(server.requests[-1])
    if changed.get("addressing_style") == "virtual":
        assert line.startswith("GET http://bucket.s3.")
    assert ("authorization" in headers) is not changed.get("anonymous", False)


@pytest.mark.usefixtures("frozen_clock")
@pytest.mark.parametrize("payload", ["true", "false"])
async def test_settings_of_the_sdk_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: str) -> None:
    (tmp_path / "config").write_text(f"[default]\ns3 =\n  payload_signing_enabled = {payload}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_RETRY_MODE", "legacy")
    monkeypatch.setenv("AWS_SDK_UA_APP_ID", "models")
    async with raw_server(PART) as server:
        await both_ways(server, s3_options(server.endpoint_url, "bucket"), generation("model"))


@pytest.mark.usefixtures("frozen_clock")
async def test_head_is_that_of_the_sdk() -> None:
    async with raw_server(HEAD) as server:
        options = s3_options(server.endpoint_url, "bucket")
        for key in ("a b", "dir/ü"):
            async with watched(options) as alone:
                await alone.store.stat(key)
                await alone.store.digest(generation(key, version_id="v 1"), certain=True)
        by_sdk = [parsed(request) for request in server.requests]
        del server.requests[:]
        async with watched(options) as one:
            for key in ("a b", "dir/ü"):
                stat = await one.store.stat(key)
                assert stat == Generation(key=key, etag=ETAG, size=7, modified_ns=1445412480 * 10**9)
                await one.store.digest(generation(key, version_id="v 1"), certain=True)
            assert one.sdk_calls == 1
    assert [parsed(request) for request in server.requests] == by_sdk


# What stays the SDK's business


async def test_other_signatures_are_left_to_the_sdk() -> None:
    async with raw_server(PART) as server, watched(s3_options(server.endpoint_url, "bucket")) as one:
        choose: Any = lambda **_: "s3"  # noqa: E731 - botocore takes what it returns for the name
        one.store._client.meta.events.register_first("choose-signer.s3", choose)
        for _ in range(3):
            assert await read(one.store, generation("model")) == CONTENT
        assert one.sdk_calls == 3
    assert all(b"Authorization: AWS AKIDEXAMPLE:" in request for request in server.requests)


def wrong_region(region: str) -> Answer:
    code = f"<Error><Code>AuthorizationHeaderMalformed</Code><Region>{region}</Region></Error>"
    return respond("400 Bad Request", code.encode())


async def test_bucket_that_turns_out_to_be_elsewhere_is_asked_there() -> None:
    answers = (PART, PART, wrong_region("eu-west-1"), PART)
    async with raw_server(*answers) as server, watched(s3_options(server.endpoint_url, "bucket")) as one:
        for _ in range(6):
            assert await read(one.store, generation("model")) == CONTENT
        calls = one.sdk_calls
    regions = [parsed(request)[1]["authorization"].split("/")[2] for request in server.requests]
    assert regions == ["us-east-1"] * 3 + ["eu-west-1"] * 4
    assert calls == 3  # the first, the redirected one, and the one that shows how to ask there


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1"])
async def test_first_request_that_is_redirected_is_not_copied(region: str) -> None:
    async with (
        raw_server(wrong_region(region), PART) as server,
        watched(s3_options(server.endpoint_url, "bucket")) as one,
    ):
        for _ in range(4):
            assert await read(one.store, generation("model")) == CONTENT
        assert one.sdk_calls == 2
    assert [parsed(request)[1]["amz-sdk-request"][-16:] for request in server.requests[2:]] == ["attempt=1; max=1"] * 3


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("404 Not Found", "NoSuchKey", ObjectNotFoundError), ("403 Forbidden", "RequestTimeTooSkewed", StoreAccessError)],
)
async def test_error_is_one_request(status: str, code: str, expected: type[Exception]) -> None:
    answers = PART, s3_error(status, code), PART
    async with raw_server(*answers) as server, watched(s3_options(server.endpoint_url, "bucket")) as one:
        await read(one.store, generation("model"))
        with pytest.raises(expected):
            await read(one.store, generation("model"))
        assert await read(one.store, generation("model")) == CONTENT
        assert one.sdk_calls == 2  # the second parses the error
    assert len(server.requests) == 3


# Credentials


def take_credentials_from(command: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the SDK know no credentials but those that a command prints."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    (directory / "config").write_text(f"[default]\ncredential_process = {command}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(directory / "config"))


@pytest.mark.promise("credentials", on="s3")
async def test_credentials_that_are_renewed_are_used_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expiry = (datetime.now(UTC) + timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")  # so soon that all are renewed
    counted = tmp_path / "count"
    program = tmp_path / "credentials.py"
    program.write_text(
        "import json, pathlib\n"
        f"count = pathlib.Path({str(counted)!r})\n"
        "number = int(count.read_text()) + 1 if count.exists() else 1\n"
        "count.write_text(str(number))\n"
        "told = {'Version': 1, 'AccessKeyId': f'AKID{number}', 'SecretAccessKey': 'secret'}\n"
        f"print(json.dumps(told | {{'SessionToken': f'token{{number}}', 'Expiration': {expiry!r}}}))\n"
    )
    take_credentials_from(f"{sys.executable} {program}", tmp_path, monkeypatch)
    async with raw_server(PART) as server, watched(s3_options(server.endpoint_url, "bucket")) as one:
        for _ in range(3):
            await read(one.store, generation("model"))
        assert one.sdk_calls == 1
    sent = [parsed(request)[1] for request in server.requests]
    numbers = [int(headers["x-amz-security-token"].removeprefix("token")) for headers in sent]
    assert numbers == sorted(set(numbers))
    assert all(f"Credential=AKID{n}/" in headers["authorization"] for n, headers in zip(numbers, sent, strict=True))


async def test_credentials_that_cannot_be_renewed_are_the_error_of_the_sdk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expiry = (datetime.now(UTC) + timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    told = tmp_path / "told"
    told.write_text(
        json.dumps({"Version": 1, "AccessKeyId": "AKID", "SecretAccessKey": "secret", "Expiration": expiry})
    )
    take_credentials_from(f"cat {told}", tmp_path, monkeypatch)
    async with raw_server(PART) as server, watched(s3_options(server.endpoint_url, "bucket")) as one:
        await read(one.store, generation("model"))
        told.write_text(told.read_text().replace(expiry, "2020-01-01T00:00:00Z"))
        with pytest.raises(StoreAccessError, match="expired"):
            await read(one.store, generation("model"))
    assert len(server.requests) == 1


# Connections


@pytest.fixture
def ports() -> list[int]:
    """From which port each request came to `keeping`."""
    return []


@pytest.fixture
def keeping(ports: list[int]) -> Iterator[str]:
    """The address of a server that keeps connections open."""

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, Mapping[str, str], bytes]:
        ports.append(request.client_address[1])
        if "missing" in request.path:
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        return 206, {"Content-Range": f"bytes 0-{LARGE - 1}/{LARGE}", "ETag": ETAG}, b"x" * LARGE

    with Server(answer).running() as server:
        yield server.url


async def test_connection_serves_one_request_after_the_other(keeping: str, ports: list[int]) -> None:
    async with watched(s3_options(keeping, "bucket")) as one:
        large = dataclasses.replace(generation("model"), size=LARGE)
        for _ in range(3):
            assert len(await read(one.store, large)) == LARGE
            with pytest.raises(ObjectNotFoundError):
                await read(one.store, dataclasses.replace(large, key="missing"))
    assert len(ports) == 6
    assert len(set(ports)) == 1


async def test_connection_of_a_body_that_is_not_read_is_closed(keeping: str, ports: list[int]) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("no room")

    async with watched(s3_options(keeping, "bucket")) as one:
        large = dataclasses.replace(generation("model"), size=LARGE)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no room"):
                await one.store.read(large, 0, LARGE, refuse)
            assert len(await read(one.store, large)) == LARGE
    first, *others = ports
    assert [port == first for port in others] == [False] * 5
    assert len(set(ports)) == 4
