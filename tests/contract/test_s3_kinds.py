"""Kinds of S3 buckets and of access to them: access points, requester pays, SSE-C, S3 Express, Transfer Acceleration.

SSE-C is tried on Ceph. No server here has the others: their requests are compared with those that the SDK itself makes
when it is asked for the same.
"""

import base64
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
import trio
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from click.testing import CliRunner

from tests.contract.backends import MAX_REQUESTS, S3Backend, needs_ceph, new_bucket, read, use_only
from tests.services import S3Server
from tests.services.ceph import Ceph
from trimsfs.checksums import crc32c
from trimsfs.cli.main import main
from trimsfs.errors import ConfigurationError, StoreError
from trimsfs.options import MountOptions
from trimsfs.stores.base import Store
from trimsfs.stores.layouts.versioned import VersionedStore
from trimsfs.stores.open import open_store, open_writer
from trimsfs.stores.writer import Writer
from trimsfs.types import Generation, Symlink

ACCOUNT = "123456789012"
ACCESS_POINT = f"arn:aws:s3:eu-west-1:{ACCOUNT}:accesspoint/models"
SEVERAL_REGIONS = f"arn:aws:s3::{ACCOUNT}:accesspoint/mfzwi23gnjvgw.mrap"
OUTPOST = f"arn:aws:s3-outposts:us-west-2:{ACCOUNT}:outpost/op-01234567890123456/accesspoint/models"
EXPRESS = "models--usw2-az1--x-s3"
CONTENT = b"weights"
LOOKS_LIKE_MD5 = f'"{hashlib.md5(b"other").hexdigest()}"'
KEY = bytes(range(32))
EMPTY = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, and a clock that stands still: requests that say the same have the same signature."""
    use_only(S3Server("http://127.0.0.1:1", "AKIDEXAMPLE", "secret"), monkeypatch)
    monkeypatch.delenv("AWS_ENDPOINT_URL")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "key"
    file.write_bytes(KEY)
    return file


class Raw(io.BytesIO):
    """A body, as urllib3 gives it."""

    def stream(self) -> Iterator[bytes]:
        yield self.read()

    def release_conn(self) -> None:
        pass


class Recorder:
    """Answers requests in the network's place, and keeps them."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sessions, self.first_session_s = 0, 3600

    def send(self, request: Any, **_: object) -> AWSResponse:
        headers = {str(name).lower(): _text(value) for name, value in request.headers.items()}
        for name in ("amz-sdk-invocation-id", "user-agent"):
            headers.pop(name, None)
        if headers.get("authorization", "").startswith("AWS4-ECDSA"):  # which is different each time
            headers["authorization"] = headers["authorization"].partition("Signature=")[0]
        self.requests.append((request.method, request.url, headers))
        about = {"ETag": LOOKS_LIKE_MD5, "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        if "?session" in request.url:
            self.sessions += 1
            lasts_s = self.first_session_s if self.sessions == 1 else 3600
            return _answer(request.url, 200, {}, _session(self.sessions, lasts_s))
        if request.method == "HEAD":
            return _answer(request.url, 200, {**about, "Content-Length": str(len(CONTENT))}, b"")
        if "range" in headers:
            content_range = f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"
            return _answer(request.url, 206, {**about, "Content-Range": content_range}, CONTENT)
        return _answer(request.url, 200, {}, EMPTY)


def _answer(url: str, status: int, headers: Any, body: bytes) -> AWSResponse:
    return AWSResponse(url, status, headers, Raw(body))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _session(number: int, lasts_s: float) -> bytes:
    expiry = (datetime.now(UTC) + timedelta(seconds=lasts_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f"<CreateSessionResult><Credentials><SessionToken>session-{number}</SessionToken><SecretAccessKey>s"
        f"</SecretAccessKey><AccessKeyId>ASIA</AccessKeyId><Expiration>{expiry}</Expiration></Credentials>"
        "</CreateSessionResult>"
    ).encode()


def recorded(options: MountOptions, recorder: Recorder) -> Store:
    """A store whose requests a recorder answers."""
    store: Any = open_store(options, max_requests=MAX_REQUESTS)
    store._client._endpoint.http_session.send = recorder.send
    found: Store = store
    return found


def generation(key: str) -> Generation:
    return Generation(key=key, etag=LOOKS_LIKE_MD5, size=len(CONTENT), modified_ns=0)


SSE_C = {
    "SSECustomerAlgorithm": "AES256",
    "SSECustomerKey": base64.b64encode(KEY).decode(),
    "SSECustomerKeyMD5": base64.b64encode(hashlib.md5(KEY).digest()).decode(),
}


@pytest.mark.usefixtures("frozen_clock")
@pytest.mark.parametrize(
    ("bucket", "region", "options", "parameters", "host"),
    [
        (ACCESS_POINT, "eu-west-1", {}, {}, f"models-{ACCOUNT}.s3-accesspoint.eu-west-1.amazonaws.com"),
        (ACCESS_POINT, "us-east-1", {}, {}, f"models-{ACCOUNT}.s3-accesspoint.eu-west-1.amazonaws.com"),
        (SEVERAL_REGIONS, "us-east-1", {}, {}, "mfzwi23gnjvgw.mrap.accesspoint.s3-global.amazonaws.com"),
        (OUTPOST, "us-west-2", {}, {}, f"models-{ACCOUNT}.op-01234567890123456.s3-outposts.us-west-2.amazonaws.com"),
        ("bucket", "us-west-2", {"requester_pays": True}, {"RequestPayer": "requester"}, ""),
        ("bucket", "us-west-2", {"sse_c_key_file": "KEY"}, SSE_C, ""),
        ("bucket", "us-west-2", {"transfer_acceleration": True}, {}, "bucket.s3-accelerate.amazonaws.com"),
        (EXPRESS, "us-west-2", {}, {}, f"{EXPRESS}.s3express-usw2-az1.us-west-2.amazonaws.com"),
    ],
    ids=["access point", "elsewhere", "regions", "outpost", "requester", "SSE-C", "acceleration", "express"],
)
async def test_requests_are_those_that_the_sdk_makes(
    key_file: Path, bucket: str, region: str, options: Mapping[str, Any], parameters: Mapping[str, Any], host: str
) -> None:
    """Also those that trimsfs makes by a template, which are the second ones of their kind."""
    options = {name: key_file if value == "KEY" else value for name, value in options.items()}
    ours, theirs = Recorder(), Recorder()
    store = recorded(MountOptions(store=f"s3://{bucket}/some dir", region=region, **options), ours)
    await store.list_page("a/")
    for key in ("first", "sec ond"):
        assert (await store.stat(key)).size == len(CONTENT)
        assert await read(store, generation(key)) == CONTENT
    await store.aclose()

    config = Config(
        s3={"use_accelerate_endpoint": options.get("transfer_acceleration", False)},
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.session.Session(region_name=region).client("s3", config=config)
    answer: Any = theirs.send  # botocore uses its result as the answer
    client.meta.events.register_first("before-send.s3", answer)
    listing = {name: value for name, value in parameters.items() if not name.startswith("SSE")}
    about: dict[str, Any] = {"Bucket": bucket}
    client.list_objects_v2(**about, Prefix="some dir/a/", Delimiter="/", MaxKeys=1000, **listing)
    for key in ("first", "sec ond"):
        client.head_object(**about, Key=f"some dir/{key}", **parameters)
        client.get_object(**about, Key=f"some dir/{key}", Range="bytes=0-6", IfMatch=LOOKS_LIKE_MD5, **parameters)[
            "Body"
        ].close()
    client.close()

    sessions = [request for request in ours.requests if "?session" in request[1]]
    assert [request for request in ours.requests if request not in sessions] == [
        request for request in theirs.requests if "?session" not in request[1]
    ]
    assert all(f"//{host}/" in url for _, url, _ in ours.requests) or not host


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        (f"s3://{ACCESS_POINT}", ACCESS_POINT, ""),
        (f"s3://{ACCESS_POINT}/", ACCESS_POINT, ""),
        (f"s3://{ACCESS_POINT}/a/b", ACCESS_POINT, "a/b/"),
        (f"s3://{SEVERAL_REGIONS}/accesspoint/x", SEVERAL_REGIONS, "accesspoint/x/"),
        (f"s3://{OUTPOST}/a", OUTPOST, "a/"),
        (f"s3://arn:aws-cn:s3:cn-north-1:{ACCOUNT}:accesspoint:models/a", None, "a/"),
    ],
)
async def test_arn_of_an_access_point_may_stand_for_the_bucket(url: str, bucket: str | None, prefix: str) -> None:
    store: Any = open_store(MountOptions(store=url), max_requests=1)
    assert store._bucket == (bucket or url.removeprefix("s3://").removesuffix("/a"))
    assert store._prefix == prefix
    await store.aclose()


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:s3:::bucket",
        f"arn:aws:s3-object-lambda:us-east-1:{ACCOUNT}:accesspoint/x",
        f"arn:aws:s3:us-east-1:{ACCOUNT}:accesspoint/",
        f"{ACCESS_POINT}:object",
    ],
)
def test_other_arns_are_refused_with_the_form(arn: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME\[/PREFIX\]"):
        open_store(MountOptions(store=f"s3://{arn}"), max_requests=1)


# S3 Express


async def test_session_of_s3_express_may_only_read_and_serves_many_requests() -> None:
    recorder = Recorder()
    store = recorded(MountOptions(store=f"s3://{EXPRESS}", region="us-west-2"), recorder)
    for number in range(3):
        assert await read(store, generation(f"model-{number}")) == CONTENT
    await store.aclose()
    (_, _, session), *reads = recorder.requests
    assert session["x-amz-create-session-mode"] == "ReadOnly"
    assert [headers["x-amz-s3session-token"] for _, _, headers in reads] == ["session-1"] * 3


async def test_session_of_s3_express_that_ends_is_renewed() -> None:
    recorder = Recorder()
    recorder.first_session_s = 2  # less than the SDK has a request rely on
    store = recorded(MountOptions(store=f"s3://{EXPRESS}", region="us-west-2"), recorder)
    for number in range(4):
        assert await read(store, generation(f"model-{number}")) == CONTENT
    await store.aclose()
    tokens = [headers.get("x-amz-s3session-token") for _, url, headers in recorder.requests if "?session" not in url]
    assert tokens[-1] == "session-2"
    assert recorder.sessions == 2


@pytest.mark.parametrize("bucket", [EXPRESS, "point--usw2-az1--xa-s3"])
async def test_etag_of_s3_express_is_no_digest(bucket: str) -> None:
    store = recorded(MountOptions(store=f"s3://{bucket}", region="us-west-2"), Recorder())
    assert [await store.digest(generation("model"), certain=certain) for certain in (False, True)] == [None, None]
    await store.aclose()


# SSE-C


@pytest.fixture
def ceph_bucket(ceph: Ceph, ceph_client: Any, monkeypatch: pytest.MonkeyPatch) -> S3Backend:
    use_only(ceph, monkeypatch)
    return new_bucket(ceph_client)


def write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def with_key(bucket: S3Backend, file: Path | None) -> Store:
    return open_store(bucket.options().model_copy(update={"sse_c_key_file": file}), max_requests=MAX_REQUESTS)


@needs_ceph
@pytest.mark.parametrize("form", ["raw", "base64"])
async def test_objects_encrypted_with_the_customers_key_are_read_with_it(
    ceph_bucket: S3Backend, key_file: Path, form: str
) -> None:
    if form == "base64":
        write(key_file, base64.b64encode(KEY) + b"\n")
    content = os.urandom(1 << 20)
    ceph_bucket.client.put_object(
        Bucket=ceph_bucket.bucket, Key="dir/model", Body=content, SSECustomerAlgorithm="AES256", SSECustomerKey=KEY
    )
    store = with_key(ceph_bucket, key_file)
    (listed,) = (await store.list_page("dir/")).objects
    for known in (listed, await store.stat("dir/model")):
        assert await read(store, known) == content
        assert await read(store, known, 1000, 70_000) == content[1000:70_000]
        assert await store.digest(known) is None, "its ETag is no digest"
    await store.aclose()


@needs_ceph
@pytest.mark.parametrize("given", [None, bytes(32)], ids=["none", "another"])
async def test_objects_encrypted_with_another_key_are_an_error(
    ceph_bucket: S3Backend, key_file: Path, given: bytes | None
) -> None:
    ceph_bucket.client.put_object(
        Bucket=ceph_bucket.bucket, Key="model", Body=CONTENT, SSECustomerAlgorithm="AES256", SSECustomerKey=KEY
    )
    write(key_file, given or b"")
    store = with_key(ceph_bucket, key_file if given is not None else None)
    (listed,) = (await store.list_page("")).objects
    with pytest.raises(StoreError, match=r"\A[^\n]+\Z") as caught:
        await read(store, listed)
    assert base64.b64encode(KEY).decode() not in str(caught.value)
    await store.aclose()


@pytest.mark.parametrize(
    ("content", "endpoint", "told"),
    [
        (b"short", None, "is not a key of 32 bytes: run `openssl rand -base64 32`"),
        (base64.b64encode(bytes(31)), None, "is not a key of 32 bytes"),
        (None, None, "No such file or directory"),
        (KEY, "http://s3.example.org", "the key would be sent in clear text: write https://"),
    ],
)
def test_key_that_cannot_be_used_is_told(
    key_file: Path, content: bytes | None, endpoint: str | None, told: str
) -> None:
    if content is None:
        key_file.unlink()
    else:
        key_file.write_bytes(content)
    options = MountOptions(store="s3://bucket", sse_c_key_file=key_file, endpoint_url=endpoint)
    with pytest.raises(ConfigurationError, match=f"option --sse-c-key-file: .*{told}"):
        open_store(options, max_requests=1)


# Transfer Acceleration


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"endpoint_url": "https://s3.example.org"}, "--endpoint-url"),
        ({"addressing_style": "path"}, "--addressing-style"),
    ],
)
def test_acceleration_of_what_is_not_aws_is_refused(more: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=f"option --transfer-acceleration: .* leave out {told}"):
        open_store(MountOptions(store="s3://bucket", transfer_acceleration=True, **more), max_requests=1)


# Writers

UPLOADS = (
    b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated><Upload><Key>some dir/begun</Key>"
    b"<UploadId>left</UploadId><Initiated>2026-01-01T00:00:00Z</Initiated></Upload></ListMultipartUploadsResult>"
)
BEGUN = b"<InitiateMultipartUploadResult><UploadId>new</UploadId></InitiateMultipartUploadResult>"


class WriteRecorder(Recorder):
    """Also answers what writers ask: an upload of the key "begun" has left these *parts*, in XML."""

    def __init__(self, parts: str = "") -> None:
        super().__init__()
        self._parts = f"<ListPartsResult><IsTruncated>false</IsTruncated>{parts}</ListPartsResult>".encode()

    def send(self, request: Any, **more: object) -> AWSResponse:
        answer = super().send(request, **more)
        if request.method == "GET" and "uploads" in request.url:
            return _answer(request.url, 200, {}, UPLOADS)
        if request.method == "GET" and "uploadId" in request.url:
            return _answer(request.url, 200, {}, self._parts)
        if request.method == "POST":
            return _answer(request.url, 200, {}, BEGUN if "?uploads" in request.url else b"<Result/>")
        return _answer(request.url, 200, {"ETag": LOOKS_LIKE_MD5}, b"") if request.method == "PUT" else answer


def recorded_writer(options: MountOptions, recorder: Recorder) -> Any:
    """A writer whose requests a recorder answers."""
    writer: Any = open_writer(options, scratch="unused", max_requests=1)
    writer.client._endpoint.http_session.send = recorder.send
    return writer


async def write_all(writer: Writer) -> None:
    """Make each kind of request once."""
    await writer.put_if_absent("small", CONTENT, sha256=hashlib.sha256(CONTENT).hexdigest())
    await writer.put_if_match("small", CONTENT, LOOKS_LIKE_MD5)
    assert await writer.find("small") is not None
    assert [stored async for stored in writer.list("m/")] == []
    for key in ("fresh", "begun"):
        upload = await writer.upload(key, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
        assert await upload.put_part(0, CONTENT)
        await upload.complete()
    await writer.discard_uploads("")
    await writer.delete(["small"])


OF_WRITERS = {
    "PutObject",
    "HeadObject",
    "ListObjectsV2",
    "ListMultipartUploads",
    "CreateMultipartUpload",
    "ListParts",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
    "DeleteObjects",
}


@pytest.mark.usefixtures("frozen_clock")
@pytest.mark.parametrize(
    ("options", "parameters"),
    [({"requester_pays": True}, {"RequestPayer": "requester"}), ({"sse_c_key_file": "KEY"}, SSE_C)],
    ids=["requester", "SSE-C"],
)
async def test_requests_of_a_writer_are_those_that_the_sdk_makes(
    key_file: Path, options: Mapping[str, Any], parameters: Mapping[str, Any]
) -> None:
    """To whom each parameter is given that an operation has, in place of the headers that trimsfs adds."""
    options = {name: key_file if value == "KEY" else value for name, value in options.items()}
    recorders = WriteRecorder(), WriteRecorder()
    asked = set[str]()
    for recorder, given in zip(recorders, (options, {}), strict=True):
        named = MountOptions(store="s3://bucket/some dir", region="us-west-2", **given)
        writer = recorded_writer(named, recorder)

        def add(params: dict[str, Any], model: Any, **_: object) -> None:
            asked.add(model.name)
            params.update({name: parameters[name] for name in model.input_shape.members if name in parameters})

        if not given:
            writer.client.meta.events.register_first("provide-client-params.s3", add)
        await write_all(writer)
        await writer.aclose()
    ours, theirs = recorders
    assert asked == OF_WRITERS
    assert ours.requests == theirs.requests


async def test_session_of_s3_express_of_a_writer_may_write() -> None:
    recorder = WriteRecorder()
    named = MountOptions(store=f"s3://{EXPRESS}", region="us-west-2")
    writer = recorded_writer(named, recorder)
    await writer.put_if_absent("small", CONTENT)
    await writer.aclose()
    (_, _, session), _ = recorder.requests
    assert "x-amz-create-session-mode" not in session


@pytest.mark.parametrize(
    ("encrypted", "content", "sent"),
    [(True, CONTENT, False), (True, b"another", True), (False, CONTENT, True)],
    ids=["same", "other", "not encrypted"],
)
async def test_parts_of_an_encrypted_upload_are_known_by_the_checksums_that_the_store_tells(
    key_file: Path, encrypted: bool, content: bytes, sent: bool
) -> None:
    """As AWS documents it; the ETags that other servers tell are MD5s with SSE-C, too."""
    crc = base64.b64encode(crc32c(CONTENT).to_bytes(4)).decode()
    part = (
        f"<Part><PartNumber>1</PartNumber><ETag>{LOOKS_LIKE_MD5}</ETag><Size>{len(CONTENT)}</Size>"
        f"<ChecksumCRC32C>{crc}</ChecksumCRC32C></Part>"
    )
    recorder = WriteRecorder(part)
    named = MountOptions(store="s3://bucket/some dir", sse_c_key_file=key_file if encrypted else None)
    writer = recorded_writer(named, recorder)
    upload = await writer.upload("begun", len(content), hashlib.sha256(content).hexdigest())
    assert await upload.put_part(0, content) is sent
    await writer.aclose()


@needs_ceph
async def test_what_is_pushed_with_a_key_is_read_with_it_only(
    ceph_bucket: S3Backend, key_file: Path, tmp_path: Path
) -> None:
    """By the commands, as a user types them: all of a version, and what describes it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes(b"{}")
    (model / "weights").write_bytes(os.urandom(17 << 20))  # in parts
    name, key = f"s3://{ceph_bucket.bucket}/m", ["--sse-c-key-file", str(key_file)]
    path = ["--endpoint-url", ceph_bucket.client.meta.endpoint_url, "--addressing-style", "path"]
    for command in (
        ["push", str(model), f"{name}:v1"],
        ["push", str(model), f"{name}:v2"],
        ["alias", name, "prod", "v1"],
        ["alias", name, "prod", "v2"],
        ["diff", f"{name}:v1", f"{name}:v2"],
        ["rollback", name, "prod"],
        ["versions", name],
        ["rm", "--grace", "0", f"{name}:v2"],
    ):
        done = await trio.to_thread.run_sync(partial(CliRunner().invoke, main, [*command, *key, *path]))
        assert done.exit_code == 0, (command, done.output)
    listed = ceph_bucket.client.list_objects_v2(Bucket=ceph_bucket.bucket)["Contents"]
    assert len(listed) == 6, "files, manifest, fingerprints, alias, and the name of the removed version"
    for item in listed:
        with pytest.raises(ceph_bucket.client.exceptions.ClientError):
            ceph_bucket.client.get_object(Bucket=ceph_bucket.bucket, Key=item["Key"])
    store = VersionedStore(with_key(ceph_bucket, key_file))
    assert (await store.list_page("m/")).prefixes == ("m/v1/",)
    assert (await store.list_page("m/prod/", limit=1)).symlink == Symlink(key="m/prod", target="v1")
    weights = await store.stat("m/v1/weights")
    assert await read(store, weights) == (model / "weights").read_bytes()
    digest = await store.digest(weights)
    assert digest is not None
    assert digest.value == hashlib.sha256((model / "weights").read_bytes()).digest()
    await store.aclose()
