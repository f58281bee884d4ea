"""What S3 and the network below it can do wrong, and what a store makes of it."""

import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.contract.backends import MAX_REQUESTS, S3Backend, needs_ceph, new_bucket, read, s3_options, use_only
from tests.contract.raw_server import Answer, drip, hang_up, raw, raw_server, reset, respond, stall, then
from tests.services import S3Server
from tests.services.ceph import Ceph
from tests.services.seaweed import Seaweed
from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.namespace.listing import NonObject
from trimsfs.namespace.tree import Namespace
from trimsfs.options import MountOptions
from trimsfs.server.startup import _configure_logging
from trimsfs.stores.base import Peekable, Store
from trimsfs.stores.open import open_store
from trimsfs.stores.retrying import Retrying, RetryingStore
from trimsfs.types import Generation

SIZE = 300_000
STALL_S, PATIENCE_S = 0.3, 10.0
"""Stall timeouts where an answer stalls, and where none does."""
CONTENT = bytes(range(250)) * (SIZE // 250)
GENERATION = Generation(key="dir/model", etag='"right"', size=SIZE, modified_ns=0)
RIGHT_RANGE = f"bytes 0-{SIZE - 1}/{SIZE}"
SECRET = "wJalrXUtnFEMIsecretK7MDENGbPxRfiCY"
TOKEN = "FwoGZXIvYXdzEBYaDsessionTOKEN"


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of no server in particular; tests with a real one replace them."""
    use_only(S3Server("http://127.0.0.1:1", "AKIDEXAMPLE", SECRET), monkeypatch)


def opened(options: MountOptions) -> aclosing[Store]:
    return aclosing(open_store(options, max_requests=MAX_REQUESTS))


@asynccontextmanager
async def store_of(*answers: Answer, stall_s: float = PATIENCE_S) -> AsyncIterator[Store]:
    """A store whose server gives these answers."""
    async with (
        raw_server(*answers) as server,
        opened(s3_options(server.endpoint_url, "bucket", stall_timeout=stall_s)) as store,
    ):
        yield store


def part(
    body: bytes = CONTENT,
    *,
    length: int = SIZE,
    content_range: str = RIGHT_RANGE,
    etag: str = GENERATION.etag,
    encoding: str | None = None,
) -> Answer:
    """The answer to a ranged GET of the whole object, right except for what is given."""
    headers = {"Content-Range": content_range, "ETag": etag}
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    return respond("206 Partial Content", body, length=length, headers=headers)


def failure(status: str, code: str = "", message: str = "because", headers: Mapping[str, str] | None = None) -> Answer:
    """An error as S3 tells it, or with no body."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
    return respond(status, body.encode(), headers=headers)


async def everything(store: Store) -> dict[str, StoreError]:
    """The errors of all calls, by the call."""
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "probe": store.probe,
        "list_page": lambda: store.list_page(""),
        "stat": lambda: store.stat("model"),
        "read": lambda: read(store, GENERATION),
    }
    errors = {}
    for name, call in calls.items():
        with pytest.raises(StoreError) as caught:
            await call()
        errors[name] = caught.value
    return errors


# Responses of a server that is broken, overloaded or no S3 server


async def test_right_answer_is_accepted() -> None:
    async with store_of(part()) as store:
        got = await read(store, GENERATION)
    assert (len(got), got == CONTENT) == (SIZE, True)


async def test_an_object_that_is_stored_compressed_comes_as_it_is_stored() -> None:
    async with store_of(part(encoding="gzip")) as store:
        assert await read(store, GENERATION) == CONTENT


ANSWERS: dict[str, tuple[Answer, type[StoreError]]] = {
    "truncated body": (part(CONTENT[:1000]), TransientStoreError),
    "no body": (part(b""), TransientStoreError),
    "truncated, and says so": (part(CONTENT[:1000], length=1000), TransientStoreError),
    "a longer body": (part(CONTENT + b"more", length=SIZE + 4), TransientStoreError),
    "compressed by a proxy": (part(b"\x1f\x8b" + CONTENT, length=SIZE + 2, encoding="gzip"), TransientStoreError),
    "body stalls": (then(part(CONTENT[:1000]), stall), StoreStalledError),
    "connection breaks in the body": (then(part(CONTENT[:1000]), reset), TransientStoreError),
    "body drips": (then(part(b""), drip(b"x" * 100, times=600)), StoreStalledError),
    "another range": (part(content_range=f"bytes 1-{SIZE}/{SIZE + 1}"), TransientStoreError),
    "another size": (part(content_range=f"bytes 0-{SIZE - 1}/{SIZE + 1}"), TransientStoreError),
    "a range that makes no sense": (part(content_range="bytes */*"), TransientStoreError),
    "whole object instead of a range": (
        respond("200 OK", CONTENT, headers={"ETag": GENERATION.etag}),
        TransientStoreError,
    ),
    "another ETag": (part(etag='"wrong"'), ObjectChangedError),
    "no ETag": (respond("206 Partial Content", CONTENT, headers={"Content-Range": RIGHT_RANGE}), TransientStoreError),
    "412 PreconditionFailed": (failure("412 Precondition Failed", "PreconditionFailed"), ObjectChangedError),
    "412 without a body": (failure("412 Precondition Failed"), ObjectChangedError),
    "416 InvalidRange": (failure("416 Range Not Satisfiable", "InvalidRange"), ObjectChangedError),
    "404 NoSuchKey": (failure("404 Not Found", "NoSuchKey"), ObjectNotFoundError),
    "404 NoSuchVersion": (failure("404 Not Found", "NoSuchVersion"), ObjectChangedError),
    "404 NoSuchBucket": (failure("404 Not Found", "NoSuchBucket"), BucketNotFoundError),
    "503 SlowDown": (failure("503 Slow Down", "SlowDown"), StoreThrottledError),
    "503 of a proxy": (respond("503 Service Unavailable", b"<html><body>busy"), StoreThrottledError),
    "429": (failure("429 Too Many Requests"), StoreThrottledError),
    "500 InternalError": (failure("500 Internal Server Error", "InternalError"), TransientStoreError),
    "500 without a body": (failure("500 Internal Server Error"), TransientStoreError),
    "502 of a proxy": (respond("502 Bad Gateway", b"<html><body>upstream"), TransientStoreError),
    "504 of a proxy": (respond("504 Gateway Timeout", b"<html><body>upstream"), TransientStoreError),
    "408 of a proxy": (failure("408 Request Timeout"), TransientStoreError),
    "400 RequestTimeout": (failure("400 Bad Request", "RequestTimeout"), TransientStoreError),
    "400 ExpiredToken": (failure("400 Bad Request", "ExpiredToken"), StoreAccessError),
    "307 TemporaryRedirect": (failure("307 Temporary Redirect", "TemporaryRedirect"), TransientStoreError),
    "307 without a body": (failure("307 Temporary Redirect"), TransientStoreError),
    "403 AccessDenied": (failure("403 Forbidden", "AccessDenied"), StoreAccessError),
    "403 of a proxy": (respond("403 Forbidden", b"<html><body>no"), StoreAccessError),
    "301 to another region": (
        failure("301 Moved Permanently", "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-1"}),
        StoreAccessError,
    ),
    "connection reset": (reset, TransientStoreError),
    "connection closed": (hang_up, TransientStoreError),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.9\r\n"), TransientStoreError),
    "nothing": (stall, StoreStalledError),
    "head stalls": (then(raw(b"HTTP/1.1 206 Partial"), stall), StoreStalledError),
    "head drips": (drip(b"H", times=600), StoreStalledError),
}


@pytest.mark.parametrize("before", [[], [part()]], ids=["first", "later"])
@pytest.mark.parametrize(("answer", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_bad_answer_to_a_read_is_an_error_and_never_wrong_bytes(
    answer: Answer, expected: type[StoreError], before: list[Answer]
) -> None:
    stall_s = STALL_S if expected is StoreStalledError else PATIENCE_S
    async with store_of(*before, answer, stall_s=stall_s) as store:
        for _ in before:
            await read(store, GENERATION)
        with trio.fail_after(stall_s * 10), pytest.raises(StoreError) as caught:
            await read(store, GENERATION)
    assert type(caught.value) is expected
    assert str(caught.value)
    assert "None" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(failure("400 Bad Request", "SomeError", "of two\r\nlines"), StoreUnavailableError, id="400"),
        pytest.param(failure("403 Forbidden", "AccessDenied", "of two\nlines"), StoreAccessError, id="403"),
        pytest.param(failure("412 Failed", "PreconditionFailed", "of two\nlines"), ObjectChangedError, id="412"),
        pytest.param(failure("503 Slow Down", "SlowDown", "of two\nlines"), StoreThrottledError, id="503"),
        pytest.param(failure("500 Internal", "InternalError", "of two\nlines"), TransientStoreError, id="500"),
    ],
)
async def test_message_of_the_server_is_told_in_one_line(answer: Answer, expected: type[StoreError]) -> None:
    async with store_of(answer) as store:
        with pytest.raises(expected, match=r"\A[^\r\n]*of two[^\r\n]*lines[^\r\n]*\Z"):
            await read(store, GENERATION)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(respond("200 OK", b"<html><body>Please sign in<br></body></html>"), id="a sign-in page"),
        pytest.param(respond("200 OK", b'{"not": "XML"}'), id="JSON"),
        pytest.param(respond("200 OK", b""), id="nothing"),
        pytest.param(respond("200 OK", b"<?xml version='1.0'?><ListBucketResult><IsTr"), id="half a document"),
        pytest.param(respond("200 OK", b"<?xml version='1.0'?><ListBucketResult/>"), id="no elements"),
        pytest.param(
            respond(
                "200 OK",
                b"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>k</Key>"
                b"<Size>1</Size><ETag>e</ETag><LastModified>yesterday</LastModified></Contents></ListBucketResult>",
            ),
            id="a time that is none",
        ),
    ],
)
async def test_answer_that_is_not_s3s_is_an_error_of_ours(answer: Answer) -> None:
    async with store_of(answer) as store:
        errors = await everything(store)
    assert {type(error) for error in errors.values()} <= {TransientStoreError, StoreUnavailableError}


def listing(names: int, *, truncated: str = "false", count: str = "", token: str = "") -> Answer:
    """A page with this many objects."""
    about = "<Size>1</Size><ETag>e</ETag><LastModified>2024-01-01T00:00:00Z</LastModified>"
    told = f"<KeyCount>{count}</KeyCount>" if count else ""
    items = "".join(f"<Contents><Key>k{number}</Key>{about}</Contents>" for number in range(names))
    body = f"<ListBucketResult>{told}<IsTruncated>{truncated}</IsTruncated>{token}{items}</ListBucketResult>"
    return respond("200 OK", f"<?xml version='1.0'?>{body}".encode())


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(listing(2, count="3"), id="fewer names than it tells"),
        pytest.param(listing(2, truncated="true"), id="truncated without a token"),
        pytest.param(
            listing(2, truncated="true", token="<NextContinuationToken></NextContinuationToken>"), id="empty token"
        ),
    ],
)
async def test_listing_that_is_not_whole_is_asked_for_again(answer: Answer) -> None:
    async with store_of(answer, listing(3, count="3")) as store:
        with pytest.raises(TransientStoreError):
            await store.list_page("")
        assert len((await store.list_page("")).objects) == 3


async def test_count_of_keys_need_not_be_told() -> None:
    async with store_of(listing(2)) as store:
        assert len((await store.list_page("")).objects) == 2


async def test_refusal_without_a_reason_is_tried_again() -> None:
    """HEAD is answered without a body, RequestTimeout too."""
    async with store_of(failure("400 Bad Request")) as store:
        with pytest.raises(TransientStoreError):
            await store.stat("model")


@pytest.mark.parametrize("before", [[], [part()]], ids=["first", "later"])
async def test_redirect_that_leads_nowhere_is_followed_once(before: list[Answer]) -> None:
    async with (
        raw_server(*before, failure("307 Temporary Redirect", "TemporaryRedirect")) as server,
        opened(s3_options(server.endpoint_url, "bucket", stall_timeout=PATIENCE_S)) as store,
    ):
        for _ in before:
            await read(store, GENERATION)
        with pytest.raises(TransientStoreError):
            await read(store, GENERATION)
    assert len(server.requests) == len(before) + 2  # the last asks where the bucket is


async def test_wrong_region_names_the_right_one() -> None:
    async with store_of(ANSWERS["301 to another region"][0]) as store:
        with pytest.raises(StoreAccessError, match=r"bucket bucket is in region eu-west-1: set --region"):
            await store.probe()


async def test_slow_body_is_accepted_while_it_is_not_too_slow() -> None:
    # 5,000 bytes every 20 ms: for much longer than the stall timeout, but above the least rate.
    pieces = [CONTENT[start : start + 5000] for start in range(0, SIZE, 5000)]
    async with store_of(then(part(b""), *(drip(piece, times=1) for piece in pieces)), stall_s=STALL_S) as store:
        began = trio.current_time()
        got = await read(store, GENERATION)
    assert trio.current_time() - began > 2 * STALL_S
    assert (len(got), got == CONTENT) == (SIZE, True)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(then(respond("200 OK", b"", length=100_000), drip(b" ", times=600)), id="body"),
        pytest.param(drip(b"H", times=600), id="head"),
    ],
)
async def test_dripping_listing_stalls(answer: Answer) -> None:
    async with store_of(answer, stall_s=STALL_S) as store:
        with trio.fail_after(STALL_S * 20), pytest.raises(StoreStalledError):
            await store.list_page("")


@pytest.mark.promise("retry", on="s3")
async def test_connection_that_breaks_again_and_again_is_tried_anew_until_it_does_not() -> None:
    answers = (reset, failure("500 Internal Server Error"), part(CONTENT[:100_000]), hang_up, part())
    async with store_of(*answers) as store:
        retrying = Retrying(deadline_s=10, on_failure=None)
        got = await retrying.call("model", lambda: read(store, GENERATION))
    assert (len(got), got == CONTENT) == (SIZE, True)
    assert retrying.statistics().failed_attempts >= 4  # a busy machine can make one more of a late answer


async def test_peek_gives_the_etag_and_the_first_bytes(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    use_only(seaweed, monkeypatch)
    with closing(seaweed.client()) as client:
        backend = new_bucket(client)
        backend.put("dir/model", CONTENT)
        async with opened(backend.options("dir")) as store:
            assert isinstance(store, Peekable)
            etag = (await store.stat("model")).etag
            assert await store.peek("model", 1000) == (etag, SIZE, CONTENT[:1000])
            assert await store.peek("model", 2 * SIZE) == (etag, SIZE, CONTENT)
            for absent in ("absent", "x" * 2000):
                with pytest.raises(ObjectNotFoundError):
                    await store.peek(absent, 1000)


@pytest.mark.parametrize(
    "answer",
    [
        part(),
        part(CONTENT[:1000], length=1000),
        part(CONTENT[1:1001], length=1000, content_range=f"bytes 1-1000/{SIZE}"),
        part(CONTENT[:1000], length=1000, content_range=f"bytes 0-999/{SIZE}, x"),
        part(CONTENT[:999], length=999, content_range=f"bytes 0-999/{SIZE}"),
        part(CONTENT[:999], length=1000, content_range=f"bytes 0-999/{SIZE}"),
        respond("200 OK", CONTENT[:1000], headers={"ETag": '"right"'}),
    ],
    ids=["all", "called all", "shifted", "odd", "short", "cut", "no range"],
)
async def test_peek_takes_no_answer_but_the_first_bytes(answer: Answer) -> None:
    async with store_of(answer) as store:
        assert isinstance(store, Peekable)
        with pytest.raises(StoreError):
            await store.peek("dir/model", 1000)


async def test_probe_does_not_wait_for_a_second_connection() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await (stall if server.requests[-1].startswith(b"HEAD") else listing(0))(stream)

    async with raw_server(answer) as server, opened(s3_options(server.endpoint_url, "bucket")) as store:
        with trio.fail_after(5):
            await store.probe()


# No server


@pytest.fixture
def dead_endpoint() -> Iterator[str]:
    """An address at which nothing listens, nor will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


async def test_dead_endpoint_is_a_passing_failure_that_is_told_quickly(dead_endpoint: str) -> None:
    async with opened(s3_options(dead_endpoint, "bucket")) as store:
        began = trio.current_time()
        errors = await everything(store)
    assert trio.current_time() - began < 10
    assert {type(error) for error in errors.values()} == {TransientStoreError}
    assert all(dead_endpoint in str(error) for error in errors.values())


async def test_dead_endpoint_is_given_up_at_the_deadline(dead_endpoint: str) -> None:
    async with opened(s3_options(dead_endpoint, "bucket")) as store:
        began = trio.current_time()
        with pytest.raises(StoreUnavailableError, match=f"model: .*{dead_endpoint}"):
            await RetryingStore(store, Retrying(deadline_s=1, on_failure=None)).stat("model")
    assert trio.current_time() - began < 10


async def test_server_that_never_answers_is_given_up_after_the_stall_timeout() -> None:
    # Listening, so that the kernel connects, but never accepting.
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        async with opened(s3_options(url, "bucket", stall_timeout=STALL_S)) as store:
            for call in (store.probe, lambda: store.stat("model"), lambda: read(store, GENERATION)):
                began = trio.current_time()
                with pytest.raises(StoreStalledError):
                    await call()
                assert STALL_S <= trio.current_time() - began < 10


async def test_name_that_does_not_resolve_is_a_passing_failure() -> None:
    async with opened(s3_options("http://store.invalid", "bucket")) as store:
        with pytest.raises(TransientStoreError, match=r"store\.invalid"):
            await store.probe()


# Credentials


@pytest.fixture
def bucket(ceph: Ceph, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Backend:
    """A private bucket of the one server here that looks at credentials, with one object in it."""
    use_only(ceph, monkeypatch)
    bucket = new_bucket(request.getfixturevalue("ceph_client"))
    bucket.put("model", b"weights")
    return bucket


def options_for(bucket: S3Backend) -> MountOptions:
    return s3_options(bucket.client.meta.endpoint_url, bucket.bucket)


def check_refused(errors: dict[str, StoreError]) -> None:
    """All are StoreAccessErrors of one line that names the bucket and what to do, and not the secret."""
    for name, error in errors.items():
        assert type(error) is StoreAccessError, f"{name}: {error!r}"
        text = str(error)
        assert "contract-" in text
        assert "check" in text or "set" in text
        assert "\n" not in text
        assert "None" not in text
        assert SECRET not in text


@needs_ceph
async def test_wrong_secret_is_refused(bucket: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    async with opened(options_for(bucket)) as store:
        check_refused(await everything(store))


@needs_ceph
async def test_unknown_access_key_is_refused(bucket: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    async with opened(options_for(bucket)) as store:
        check_refused(await everything(store))


@needs_ceph
async def test_no_credentials_are_told_apart(bucket: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with opened(options_for(bucket)) as store:
        errors = await everything(store)
    check_refused(errors)
    assert all("Unable to locate credentials" in str(error) for error in errors.values())
    assert all("--anonymous" in str(error) for error in errors.values())


@needs_ceph
async def test_half_of_the_credentials_is_refused(bucket: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises((StoreAccessError, ConfigurationError), match=r"(?i)\A[^\n]*secret[^\n]*\Z"):
        async with opened(options_for(bucket)) as store:
            await store.probe()


@needs_ceph
async def test_anonymous_is_refused_by_a_private_bucket(bucket: S3Backend) -> None:
    options = options_for(bucket).model_copy(update={"anonymous": True})
    async with opened(options) as store:
        check_refused(await everything(store))


@needs_ceph
async def test_anonymous_reads_a_public_bucket(bucket: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = [f"arn:aws:s3:::{bucket.bucket}", f"arn:aws:s3:::{bucket.bucket}/*"]
    actions = ["s3:ListBucket", "s3:GetObject"]
    allow = {"Effect": "Allow", "Principal": "*", "Action": actions, "Resource": resources}
    policy = {"Version": "2012-10-17", "Statement": [allow]}
    bucket.client.put_bucket_policy(Bucket=bucket.bucket, Policy=json.dumps(policy))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    async with opened(options_for(bucket).model_copy(update={"anonymous": True})) as store:
        await store.probe()
        (generation,) = (await store.list_page("")).objects
        assert generation == replace(await store.stat("model"), version_id=None)
        assert await read(store, generation) == b"weights"


@pytest.mark.promise("credentials", on="ceph")
@needs_ceph
async def test_profile_gives_the_credentials(
    bucket: S3Backend, ceph: Ceph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text(f"[models]\naws_access_key_id = {ceph.access_key}\naws_secret_access_key = {ceph.secret_key}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    async with opened(options_for(bucket).model_copy(update={"profile": "models"})) as store:
        assert (await store.stat("model")).size == 7


# Options that cannot be used


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        pytest.param({"profile": "none"}, "none", id="profile"),
        pytest.param({"endpoint_url": "127.0.0.1:9000"}, "127.0.0.1:9000", id="no scheme"),
        pytest.param({"endpoint_url": "http://"}, "http://", id="no host"),
        pytest.param({"endpoint_url": ""}, "endpoint", id="empty"),
        pytest.param({"endpoint_url": "http://[::1"}, "URL", id="no address"),
        pytest.param({"endpoint_url": "http://two words"}, "two words", id="space"),
        pytest.param({"endpoint_url": "ftp://127.0.0.1"}, "ftp", id="not HTTP"),
        pytest.param({"endpoint_url": "http://127.0.0.1:port"}, "port", id="port is a word"),
        pytest.param({"endpoint_url": "http://127.0.0.1:99999"}, "99999", id="port out of range"),
        pytest.param({"region": "not a region!"}, "not a region!", id="region"),
        pytest.param({"region": "us-east-1\n"}, "us-east-1", id="region and newline"),
        pytest.param({"store": "s3://"}, "bucket", id="no bucket"),
        pytest.param({"store": "s3:///prefix"}, "bucket", id="no bucket but a prefix"),
        pytest.param({"store": "s3://[bucket"}, "bucket", id="no URL"),
        pytest.param({"store": "ftp3://bucket"}, "ftp3", id="another scheme"),
        pytest.param({"store": "http://bucket"}, "aiohttp", id="HTTP"),
    ],
)
async def test_option_that_cannot_be_used_is_a_configuration_error(changed: dict[str, str], cause: str) -> None:
    options = s3_options("http://127.0.0.1:1", "bucket").model_copy(update=changed)
    with pytest.raises(ConfigurationError) as caught:
        await open_store(options, max_requests=MAX_REQUESTS).aclose()
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "Upper_Case",
        "a..b",
        "x",
        "-dashes-",
        "1.2.3.4",
        "b" * 256,
        "two words",
        "ünïcödé",
        "a:b",
        "a@b",
        "*",
        "arn:aws:s3:::b",
    ],
)
async def test_bucket_name_that_cannot_be_is_an_error_of_ours(s3: S3Backend, name: str) -> None:
    options = s3_options(s3.client.meta.endpoint_url, name)
    with pytest.raises((ConfigurationError, BucketNotFoundError), match=r"\A[^\n]+\Z") as caught:
        async with opened(options) as store:
            await store.probe()
    assert name in str(caught.value)


@pytest.mark.parametrize("prefix", ["what?", "no#1", "what?no#1", "50%", "%20", "a b", "ü", "a/b", "a+b&c"])
async def test_prefix_may_be_of_any_characters(s3: S3Backend, prefix: str) -> None:
    s3.put(f"{prefix}/model", b"inside")
    s3.put("what/model", b"outside")
    s3.put("no/model", b"outside")
    store = s3.open(prefix)
    generation = await store.stat("model")
    assert await read(store, generation) == b"inside"
    await store.aclose()


# Directories that have an object of their own, as consoles make them


@pytest.mark.parametrize("children", [0, 1])
async def test_directory_with_a_marker_is_found_in_a_directory_too_large_to_list(
    s3: S3Backend, monkeypatch: pytest.MonkeyPatch, children: int
) -> None:
    monkeypatch.setattr("trimsfs.stores.s3.PAGE_LIMIT", 2)
    for key in ("a", "b", "c", "model/", *(f"model/{number}" for number in range(children))):
        s3.put(key, b"")
    store = s3.open()
    namespace = Namespace(store, ttl_s=60)

    found, _ = await namespace.lookup("", b"model")
    listed = (await namespace.entries(""))[b"model"]
    assert (found, listed) == (NonObject.DIRECTORY, NonObject.DIRECTORY)
    await store.aclose()


# Secrets


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All that a server logs which is told to log everything it may."""
    names = ("boto3", "botocore", "urllib3")
    before = {name: logging.getLogger(name).level for name in names}
    caplog.set_level(logging.DEBUG)
    _configure_logging(MountOptions(log_level="debug"))
    yield caplog
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("end", ["", "\n"], ids=["as it is", "newline"])
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
async def test_no_secret_is_in_an_error_or_a_log(
    logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, variable: str, end: str
) -> None:
    # A line's end too many is what a secret read from a file often has.
    values = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    for name, value in values.items():
        monkeypatch.setenv(name, value + (end if name == variable else ""))

    told: list[str] = []
    for answer in (failure("403 Forbidden", "SignatureDoesNotMatch"), failure("500 Internal Server Error"), hang_up):
        async with store_of(answer) as store:
            for inner in (store, RetryingStore(store, Retrying(deadline_s=0.05, on_failure=None))):
                told += [str(error) for error in (await everything(inner)).values()]

    assert len(told) == 24
    assert end or "attempt 1 failed" in logged.text
    text = "\n".join([*told, logged.text])
    for secret in (SECRET, TOKEN, "AWS4-HMAC-SHA256", "Signature="):
        assert secret not in text


async def test_password_in_the_endpoint_is_in_no_error(dead_endpoint: str) -> None:
    url = dead_endpoint.replace("http://", f"http://user:{SECRET}@")
    with pytest.raises((ConfigurationError, TransientStoreError)) as caught:
        async with opened(s3_options(url, "bucket")) as store:
            await store.probe()
    assert SECRET not in str(caught.value)
