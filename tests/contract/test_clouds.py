"""What S3, cloud services and the network below them can do wrong, and what their stores make of it."""

import base64
import hashlib
import hmac
import json
import os
import random
from contextlib import nullcontext
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import trio

from tests.contract.backends import AzureBackend, new_container, new_google_bucket, read, use_cloud
from tests.contract.clouds import (
    CLOUDS,
    CONTENT,
    PATIENCE_S,
    RIGHT_RANGE,
    SECRET,
    SIZE,
    STALL_S,
    Cloud,
    azure_error,
    everything,
    forget,
    opened,
    served,
)
from tests.contract.raw_server import Answer, drip, hang_up, raw, reset, respond, stall, then
from tests.services.azurite import ACCOUNT, KEY, Azurite
from tests.services.fake_gcs import GoogleServer, start_gcp_storage_emulator
from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.cloud import cloud_store
from trimsfs.extras.stores.cloud.azure import API_VERSION
from trimsfs.stores.base import Store
from trimsfs.stores.digests import Digest, compute
from trimsfs.stores.retrying import Retrying
from trimsfs.types import Generation

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """Each cloud, with credentials of no server in particular."""
    forget(monkeypatch)
    monkeypatch.setenv("AZURE_STORAGE_KEY", SECRET)
    return CLOUDS[request.param]


# Answers that are wrong


@pytest.mark.promise("conditional ranged read")
async def test_a_read_asks_for_one_content_and_takes_the_right_answer(cloud: Cloud) -> None:
    async with served(cloud, cloud.part()) as (server, store):
        assert await read(store, cloud.generation) == CONTENT
    [request] = server.requests
    assert f"Range: bytes=0-{SIZE - 1}".encode() in request
    pinned = {"s3": "If-Match: {}", "gs": "generation={}", "az": 'If-Match: "{}"'}[cloud.url[:2]].format(cloud.content)
    assert pinned.encode() in request


def answers(cloud: Cloud) -> dict[str, tuple[Answer, type[StoreError]]]:
    return {
        "truncated body": (cloud.part(CONTENT[:1000]), TransientStoreError),
        "no body": (cloud.part(b""), TransientStoreError),
        "a longer body": (cloud.part(CONTENT + b"more", length=SIZE + 4), TransientStoreError),
        "compressed by a proxy": (
            cloud.part(b"\x1f\x8b" + CONTENT, length=SIZE + 2, encoding="gzip"),
            TransientStoreError,
        ),
        "truncated, and says so": (cloud.part(CONTENT[:1000], length=1000), TransientStoreError),
        "body stalls": (then(cloud.part(CONTENT[:1000]), stall), StoreStalledError),
        "connection breaks in the body": (then(cloud.part(CONTENT[:1000]), reset), TransientStoreError),
        "body drips": (then(cloud.part(b""), drip(b"x" * 100, times=600)), StoreStalledError),
        "another range": (cloud.part(content_range=f"bytes 1-{SIZE}/{SIZE + 1}"), TransientStoreError),
        "another size": (cloud.part(content_range=f"bytes 0-{SIZE - 1}/{SIZE + 1}"), TransientStoreError),
        "a range that makes no sense": (cloud.part(content_range="bytes */*"), TransientStoreError),
        "whole object": (respond("200 OK", CONTENT, headers={cloud.header: cloud.content}), TransientStoreError),
        "another content": (cloud.part(content=cloud.other), ObjectChangedError),
        "no name of its content": (
            respond("206 Partial Content", CONTENT, headers={"Content-Range": RIGHT_RANGE}),
            StoreUnavailableError,
        ),
        "412": (respond("412 Precondition Failed"), ObjectChangedError),
        "416": (respond("416 Range Not Satisfiable"), ObjectChangedError),
        "404": (respond("404 Not Found"), ObjectNotFoundError),
        "no container": (cloud.missing, BucketNotFoundError),
        "401": (respond("401 Unauthorized"), StoreAccessError),
        "403 of a proxy": (respond("403 Forbidden", b"<html><body>no"), StoreAccessError),
        "429": (respond("429 Too Many Requests"), StoreThrottledError),
        "503 of a proxy": (respond("503 Service Unavailable", b"<html><body>busy"), StoreThrottledError),
        "500": (respond("500 Internal Server Error"), TransientStoreError),
        "502 of a proxy": (respond("502 Bad Gateway", b"<html><body>upstream"), TransientStoreError),
        "504 of a proxy": (respond("504 Gateway Timeout", b"<html><body>upstream"), TransientStoreError),
        "408": (respond("408 Request Timeout"), TransientStoreError),
        "400": (respond("400 Bad Request"), StoreUnavailableError),
        "redirect": (respond("302 Found", headers={"Location": "http://127.0.0.1:1/"}), StoreUnavailableError),
        "archived": (azure_error("409 Conflict", "BlobArchived"), StoreUnavailableError),
        "connection reset": (reset, TransientStoreError),
        "connection closed": (hang_up, TransientStoreError),
        "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.9\r\n"), TransientStoreError),
        "nothing": (stall, StoreStalledError),
        "head stalls": (then(raw(b"HTTP/1.1 206 Partial"), stall), StoreStalledError),
        "head drips": (drip(b"H", times=600), StoreStalledError),
    }


@pytest.mark.parametrize("before", [0, 1], ids=["first", "later"])
@pytest.mark.parametrize("name", answers(CLOUDS["gs"]))
async def test_bad_answer_to_a_read_is_an_error_and_never_wrong_bytes(cloud: Cloud, name: str, before: int) -> None:
    answer, expected = answers(cloud)[name]
    expected = cloud.unlike.get(name, expected)
    stall_s = STALL_S if expected is StoreStalledError else PATIENCE_S
    async with served(cloud, *[cloud.part()] * before, answer, stall_s=stall_s) as (_, store):
        for _ in range(before):
            await read(store, cloud.generation)
        with trio.fail_after(stall_s * 10), pytest.raises(StoreError, match=r"\A[^\r\n]+\Z") as caught:
            await read(store, cloud.generation)
    assert type(caught.value) is expected
    assert "None" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"<html><body>Please sign in<br></body></html>", id="a sign-in page"),
        pytest.param(b"<html></html>", id="XML"),
        pytest.param(b"[1]", id="JSON"),
        pytest.param(b'{"items": [{"name": "x"}]}', id="an item without fields"),
        pytest.param(b"<EnumerationResults><Blobs><Blob/></Blobs></EnumerationResults>", id="a blob without fields"),
        pytest.param(b"<?xml version='1.0'?><ListBucketResult><IsTr", id="half a document"),
        pytest.param(b"<?xml version='1.0'?><ListBucketResult/>", id="no elements"),
        pytest.param(
            b"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>k</Key>"
            b"<Size>1</Size><ETag>e</ETag><LastModified>yesterday</LastModified></Contents></ListBucketResult>",
            id="a time that is none",
        ),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_answer_that_is_not_the_clouds_is_an_error_of_ours(cloud: Cloud, body: bytes) -> None:
    async with served(cloud, respond("200 OK", body)) as (_, store):
        errors = await everything(store, cloud.generation)
    assert {type(error) for error in errors.values()} <= {TransientStoreError, StoreUnavailableError}
    # Of some, the SDK of S3 makes a status of 500.
    assert f"the answer is not from {cloud.product}" in str(errors["list_page"]) or cloud is CLOUDS["s3"]


@pytest.mark.promise("retry")
async def test_connection_that_breaks_again_and_again_is_tried_anew_until_it_does_not(cloud: Cloud) -> None:
    answers = (reset, respond("500 Internal Server Error"), cloud.part(CONTENT[:100_000]), hang_up, cloud.part())
    async with served(cloud, *answers) as (_, store):
        retrying = Retrying(deadline_s=10, on_failure=None)
        assert await retrying.call("model", lambda: read(store, cloud.generation)) == CONTENT
    assert retrying.statistics().failed_attempts >= 4  # a busy machine can make one more of a late answer


async def test_an_object_that_is_stored_compressed_comes_as_it_is_stored(cloud: Cloud) -> None:
    """Recorded: without Accept-Encoding, Google decompresses it, and sends all of it in place of a range."""
    async with served(cloud, cloud.part(encoding="gzip")) as (server, store):
        assert await read(store, cloud.generation) == CONTENT
    assert cloud.url[:2] != "gs" or b"Accept-Encoding: gzip" in server.requests[0]


async def test_dripping_or_endless_listing_fails(cloud: Cloud) -> None:
    dripping = then(respond("200 OK", b"", length=100_000), drip(b" ", times=600))
    endless = then(respond("200 OK", b"", length=1 << 30), drip(b" " * (1 << 20), times=100, pause_s=0))
    async with served(cloud, dripping, endless, stall_s=STALL_S) as (_, store):
        with trio.fail_after(STALL_S * 20), pytest.raises(StoreStalledError):
            await store.list_page("")
        with trio.fail_after(STALL_S * 40), pytest.raises(TransientStoreError, match=r"larger than|no complete answer"):
            await store.list_page("")


def empty_pages(kind: str, count: int) -> list[Answer]:
    """Pages without a name, each with a token, and one with a name."""
    if kind == "gs":
        item = {"name": "d/model", "size": "1", "generation": "1", "timeCreated": "2024-01-01T00:00:00Z"}
        bodies = [json.dumps({"nextPageToken": str(number)}) for number in range(count)]
        return [respond("200 OK", body.encode()) for body in (*bodies, json.dumps({"items": [item]}))]
    about = (
        "<Etag>0x1</Etag><Content-Length>1</Content-Length><Last-Modified>Mon, 01 Jan 2024 00:00:00 GMT</Last-Modified>"
    )
    blob = f"<Blob><Name>d/model</Name><Properties>{about}</Properties></Blob>"
    pages = [f"<Blobs/><NextMarker>{number}</NextMarker>" for number in range(count)]
    bodies = [f"<EnumerationResults>{page}</EnumerationResults>" for page in (*pages, f"<Blobs>{blob}</Blobs>")]
    return [respond("200 OK", f"\ufeff{body}".encode()) for body in bodies]


@pytest.mark.parametrize("cloud", ["gs", "az"], indirect=True)
async def test_pages_without_a_name_are_passed_over_but_not_for_ever(cloud: Cloud) -> None:
    kind = cloud.url[:2]
    async with served(cloud, *empty_pages(kind, 3)) as (server, store):
        page = await store.list_page("d/", limit=1)
    assert ([generation.key for generation in page.objects], len(server.requests)) == (["d/model"], 4)
    markers = [dict(parse_qsl(urlsplit(request.split()[1].decode()).query)) for request in server.requests]
    assert [query.get("pageToken", query.get("marker")) for query in markers] == [None, "0", "1", "2"]
    async with served(cloud, *empty_pages(kind, cloud_store.EMPTY_PAGES)) as (_, store):
        with pytest.raises(TransientStoreError, match="pages without a name"):
            await store.list_page("d/")
    async with served(cloud, empty_pages(kind, 1)[0]) as (server, store):
        with pytest.raises(StoreUnavailableError, match="has no end"):
            await store.list_page("d/")
    assert len(server.requests) == 2


# Google Cloud Storage


@pytest.fixture
def google(fake_gcs: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> GoogleServer:
    use_cloud(fake_gcs, monkeypatch)
    return fake_gcs


async def test_a_bucket_that_keeps_versions_serves_the_generation_that_was_replaced(google: GoogleServer) -> None:
    backend = new_google_bucket(google, versions=True)
    old, new = (random.Random(seed).randbytes(SIZE) for seed in (1, 2))
    backend.put("model", old)
    store = backend.open()
    generation = await store.stat("model")
    backend.put("model", new)

    assert await read(store, generation) == old
    assert await read(store, await store.stat("model")) == new
    await store.aclose()


async def test_a_server_that_ignores_generations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcp-storage-emulator answers a read of an old generation with the bytes of the new one, and names neither."""
    with start_gcp_storage_emulator() as server:
        use_cloud(server, monkeypatch)
        backend = new_google_bucket(server)
        backend.put("model", CONTENT)
        store = backend.open()
        generation = await store.stat("model")
        assert await told_digest(store, generation) is not None
        backend.put("model", CONTENT[::-1])
        target = f"/storage/v1/b/{backend.bucket}/o/model?alt=media&generation={generation.etag.partition(';')[0]}"
        assert backend.request("GET", target) == CONTENT[::-1]
        with pytest.raises(StoreUnavailableError, match="does not name its content: check the endpoint"):
            await read(store, generation)
        await store.aclose()


async def told_digest(store: Store, generation: Generation) -> Digest | None:
    """The digest, which takes no request; `certain` is the same."""
    digest = await store.digest(generation)
    assert digest == await store.digest(generation, certain=True)
    return digest


def right(digest: Digest | None, content: bytes, directory: Path) -> bool:
    """Whether it is the digest of all of the content."""
    assert digest is not None
    assert (digest.parts, digest.certain, digest.binding) == (0, True, True)
    (directory / "content").write_bytes(content)
    descriptor = os.open(directory / "content", os.O_RDONLY)
    try:
        return compute(descriptor, len(content), digest.algorithm, 0) == digest.value
    finally:
        os.close(descriptor)


@pytest.mark.promise("digest", on="fake-gcs")
async def test_crc32c_is_told_by_listings_and_stat_without_a_request(google: GoogleServer, tmp_path: Path) -> None:
    backend = new_google_bucket(google)
    for key, content in {"model": CONTENT, "empty": b""}.items():
        backend.put(key, content)
        store = backend.open()
        listed = next(one for one in (await store.list_page("")).objects if one.key == key)
        digest = await told_digest(store, await store.stat(key))
        assert digest is not None
        assert digest.algorithm == "crc32c"
        assert digest == await told_digest(store, listed)
        assert right(digest, content, tmp_path)
        await store.aclose()


# Azure Blob Storage


@pytest.fixture
def container(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> AzureBackend:
    use_cloud(azurite, monkeypatch)
    return new_container(azurite)


@pytest.mark.promise("digest", on="azurite")
async def test_md5_is_told_by_listings_and_stat_without_a_request(container: AzureBackend, tmp_path: Path) -> None:
    container.put("model", CONTENT)
    store = container.open()
    (listed,) = (await store.list_page("")).objects
    digest = await told_digest(store, listed)
    assert digest is not None
    assert digest.algorithm == "md5"
    assert digest == await told_digest(store, await store.stat("model"))
    assert right(digest, CONTENT, tmp_path)
    await store.aclose()


@pytest.mark.promise("credentials", on="azurite")
async def test_a_wrong_key_is_refused_and_names_the_remedy(
    container: AzureBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azurite verifies the signature."""
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_KEY", SECRET)
    async with opened(f"az://{container.container}", container.endpoint_url, anonymous=False) as store:
        errors = await everything(store, CLOUDS["az"].generation)
    for error in errors.values():
        assert type(error) is StoreAccessError
        assert "check the credentials: AZURE_STORAGE_KEY" in str(error)
        assert SECRET not in str(error)


@pytest.mark.promise("credentials", on="azurite")
async def test_variables_of_the_az_command_name_account_and_key(
    container: AzureBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    container.put("model", CONTENT)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    async with opened(f"az://{container.container}", container.endpoint_url, anonymous=False) as store:
        assert await read(store, await store.stat("model")) == CONTENT


@pytest.mark.promise("credentials", on="azurite")
async def test_a_sas_token_reads_and_lists(container: AzureBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azurite verifies the token."""
    container.put("two words", CONTENT)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    for key, refused in ((KEY, False), (SECRET, True)):
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"?{sas_token(key)}")
        async with opened(f"az://{container.container}", container.endpoint_url, anonymous=False) as store:
            with pytest.raises(StoreAccessError) if refused else nullcontext():
                (generation,) = (await store.list_page("")).objects
                assert await read(store, generation) == CONTENT


def sas_token(key: str) -> str:
    """A token that may read and list all of the account, signed as Azure documents it."""
    fields = {
        "sp": "rl",
        "ss": "b",
        "srt": "sco",
        "st": "",
        "se": "2100-01-01T00:00:00Z",
        "sip": "",
        "spr": "https,http",
    }
    fields["sv"] = API_VERSION["x-ms-version"]
    text = "\n".join([ACCOUNT, *fields.values(), "", ""])
    signature = hmac.digest(base64.b64decode(key), text.encode(), hashlib.sha256)
    return urlencode({**fields, "sig": base64.b64encode(signature).decode()})


@pytest.mark.parametrize("cloud", ["az"], indirect=True)
async def test_version_is_asked_for_where_the_account_keeps_versions(cloud: Cloud) -> None:
    """Recorded: Azurite keeps no versions."""
    headers = {"Content-Range": RIGHT_RANGE, "ETag": cloud.content, "x-ms-version-id": "2026-01-01T00:00:00.0000000Z"}
    async with served(cloud, respond("206 Partial Content", CONTENT, headers=headers)) as (server, store):
        received = bytearray()
        version = await store.read(cloud.generation, 0, SIZE, received.extend)
        pinned = Generation(key="dir/model", etag=cloud.etag, size=SIZE, modified_ns=0, version_id=version)
        await read(store, pinned)
    assert version == headers["x-ms-version-id"]
    assert b"versionid=" not in server.requests[0]
    assert b"?versionid=2026-01-01T00%3A00%3A00.0000000Z" in server.requests[1]


@pytest.mark.parametrize("cloud", ["az"], indirect=True)
async def test_directories_of_a_hierarchical_namespace_are_no_objects(cloud: Cloud) -> None:
    """Recorded: Azurite has no hierarchical namespace."""
    about = (
        "<Etag>0x1</Etag><Content-Length>0</Content-Length><Last-Modified>Mon, 01 Jan 2024 00:00:00 GMT</Last-Modified>"
    )
    body = (
        "<EnumerationResults><Blobs><BlobPrefix><Name>dir/</Name></BlobPrefix><Blob><Name>dir</Name><Properties>"
        f"{about}<ResourceType>directory</ResourceType></Properties></Blob></Blobs><NextMarker/></EnumerationResults>"
    )
    stat = {"x-ms-resource-type": "directory", "ETag": "0x1", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    async with served(cloud, respond("200 OK", body.encode()), respond("200 OK", headers=stat)) as (_, store):
        page = await store.list_page("")
        assert (page.objects, page.prefixes) == ((), ("dir/",))
        with pytest.raises(ObjectNotFoundError, match="a directory"):
            await store.stat("dir")
