"""What S3 and the network below it can do wrong, and what a store makes of it."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.contract.backends import MAX_REQUESTS, S3Backend, needs_ceph, new_bucket, read, s3_options, use_only
from tests.contract.clouds import CLOUDS, CONTENT, SIZE, STALL_S, everything, s3_error, served
from tests.contract.raw_server import Answer, drip, hang_up, raw_server, respond, stall, then
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

S3 = CLOUDS["s3"]
SECRET = "wJalrXUtnFEMIsecretK7MDENGbPxRfiCY"
TOKEN = "FwoGZXIvYXdzEBYaDsessionTOKEN"


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of no server in particular; tests with a real one replace them."""
    use_only(S3Server("http://127.0.0.1:1", "AKIDEXAMPLE", SECRET), monkeypatch)


def opened(options: MountOptions) -> aclosing[Store]:
    return aclosing(open_store(options, max_requests=MAX_REQUESTS))


# Responses of a server that is broken or overloaded

ERRORS = [
    ("412 Precondition Failed", "PreconditionFailed", ObjectChangedError),
    ("416 Range Not Satisfiable", "InvalidRange", ObjectChangedError),
    ("404 Not Found", "NoSuchKey", ObjectNotFoundError),
    ("404 Not Found", "NoSuchVersion", ObjectChangedError),
    ("503 Slow Down", "SlowDown", StoreThrottledError),
    ("500 Internal Server Error", "InternalError", TransientStoreError),
    ("400 Bad Request", "RequestTimeout", TransientStoreError),
    ("400 Bad Request", "ExpiredToken", StoreAccessError),
    ("400 Bad Request", "SomeError", StoreUnavailableError),
    ("307 Temporary Redirect", "TemporaryRedirect", TransientStoreError),
    ("307 Temporary Redirect", "", TransientStoreError),
    ("403 Forbidden", "AccessDenied", StoreAccessError),
    ("301 Moved Permanently", "PermanentRedirect", StoreAccessError),
]


@pytest.mark.parametrize("before", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize(("status", "code", "expected"), ERRORS)
async def test_error_that_s3_tells_is_told_in_one_line(
    status: str, code: str, expected: type[StoreError], before: int
) -> None:
    answer = s3_error(status, code, "of two\r\nlines", {"x-amz-bucket-region": "eu-west-1"})
    async with served(S3, *[S3.part()] * before, answer) as (_, store):
        for _ in range(before):
            await read(store, S3.generation)
        with pytest.raises(StoreError, match=r"\A[^\r\n]+\Z") as caught:
            await read(store, S3.generation)
    assert type(caught.value) is expected
    assert "None" not in str(caught.value)
    told = {"NoSuchKey": "no such object", "PermanentRedirect": "bucket bucket is in region eu-west-1: set --region"}
    assert told.get(code, "of two lines" if code else "") in str(caught.value)


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
    async with served(S3, answer, listing(3, count="3")) as (_, store):
        with pytest.raises(TransientStoreError):
            await store.list_page("")
        assert len((await store.list_page("")).objects) == 3


async def test_count_of_keys_need_not_be_told() -> None:
    async with served(S3, listing(2)) as (_, store):
        assert len((await store.list_page("")).objects) == 2


async def test_refusal_without_a_reason_is_tried_again() -> None:
    """HEAD is answered without a body, RequestTimeout too."""
    async with served(S3, s3_error("400 Bad Request")) as (_, store):
        with pytest.raises(TransientStoreError):
            await store.stat("model")


@pytest.mark.parametrize("before", [0, 1], ids=["first", "later"])
async def test_redirect_that_leads_nowhere_is_followed_once(before: int) -> None:
    redirect = s3_error("307 Temporary Redirect", "TemporaryRedirect")
    async with served(S3, *[S3.part()] * before, redirect) as (server, store):
        for _ in range(before):
            await read(store, S3.generation)
        with pytest.raises(TransientStoreError):
            await read(store, S3.generation)
    assert len(server.requests) == before + 2  # the last asks where the bucket is


async def test_slow_body_is_accepted_while_it_is_not_too_slow() -> None:
    # 5,000 bytes every 20 ms: for much longer than the stall timeout, but above the least rate.
    pieces = [CONTENT[start : start + 5000] for start in range(0, SIZE, 5000)]
    slow = then(S3.part(b""), *(drip(piece, times=1) for piece in pieces))
    async with served(S3, slow, stall_s=STALL_S) as (_, store):
        began = trio.current_time()
        got = await read(store, S3.generation)
    assert trio.current_time() - began > 2 * STALL_S
    assert (len(got), got == CONTENT) == (SIZE, True)


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
        S3.part(),
        S3.part(CONTENT[:1000], length=1000),
        S3.part(CONTENT[1:1001], length=1000, content_range=f"bytes 1-1000/{SIZE}"),
        S3.part(CONTENT[:1000], length=1000, content_range=f"bytes 0-999/{SIZE}, x"),
        S3.part(CONTENT[:999], length=999, content_range=f"bytes 0-999/{SIZE}"),
        S3.part(CONTENT[:999], length=1000, content_range=f"bytes 0-999/{SIZE}"),
        respond("200 OK", CONTENT[:1000], headers={"ETag": '"right"'}),
    ],
    ids=["all", "called all", "shifted", "odd", "short", "cut", "no range"],
)
async def test_peek_takes_no_answer_but_the_first_bytes(answer: Answer) -> None:
    async with served(S3, answer) as (_, store):
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


NO_KEYS = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))


def change(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str | None]) -> None:
    """Set variables of the environment, or remove those without a value."""
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)


@needs_ceph
@pytest.mark.parametrize(
    ("changed", "anonymous", "told"),
    [
        pytest.param({"AWS_SECRET_ACCESS_KEY": SECRET}, False, "", id="wrong secret"),
        pytest.param({"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE"}, False, "", id="unknown key"),
        pytest.param({}, True, "", id="anonymous"),
        pytest.param(NO_KEYS, False, "Unable to locate credentials: set .* --anonymous", id="none"),
    ],
)
async def test_credentials_that_do_not_hold_are_refused(
    bucket: S3Backend, monkeypatch: pytest.MonkeyPatch, changed: Mapping[str, str | None], anonymous: bool, told: str
) -> None:
    change(monkeypatch, changed)
    async with opened(options_for(bucket).model_copy(update={"anonymous": anonymous})) as store:
        errors = await everything(store, S3.generation)
    for name, error in errors.items():
        assert type(error) is StoreAccessError, f"{name}: {error!r}"
        text = str(error)
        assert "contract-" in text
        assert "check" in text or "set" in text
        assert re.search(told, text)
        assert "None" not in text
        assert SECRET not in text


@needs_ceph
async def test_half_of_the_credentials_is_refused(bucket: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises((StoreAccessError, ConfigurationError), match=r"(?i)\A[^\n]*secret[^\n]*\Z"):
        async with opened(options_for(bucket)) as store:
            await store.probe()


@needs_ceph
async def test_anonymous_reads_a_public_bucket(bucket: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = [f"arn:aws:s3:::{bucket.bucket}", f"arn:aws:s3:::{bucket.bucket}/*"]
    actions = ["s3:ListBucket", "s3:GetObject"]
    allow = {"Effect": "Allow", "Principal": "*", "Action": actions, "Resource": resources}
    policy = {"Version": "2012-10-17", "Statement": [allow]}
    bucket.client.put_bucket_policy(Bucket=bucket.bucket, Policy=json.dumps(policy))
    change(monkeypatch, NO_KEYS)

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
    change(monkeypatch, NO_KEYS)
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
    for answer in (s3_error("403 Forbidden", "SignatureDoesNotMatch"), s3_error("500 Internal Server Error"), hang_up):
        async with served(S3, answer, anonymous=False) as (_, store):
            for inner in (store, RetryingStore(store, Retrying(deadline_s=0.05, on_failure=None))):
                told += [str(error) for error in (await everything(inner, S3.generation)).values()]

    assert len(told) == 24
    assert end or "attempt 1 failed" in logged.text
    text = "\n".join([*told, logged.text])
    for secret in (SECRET, TOKEN, "AWS4-HMAC-SHA256", "Signature="):
        assert secret not in text
