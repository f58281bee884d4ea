"""Tests of the test servers: exact bytes, exact counts, and nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, get_args

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, SSLError

from tests.contract.backends import use_cloud
from trimsfs.options import MountOptions
from trimsfs.stores.open import open_store

from . import S3Server, ServiceError, ceph, moto, reserved_ports, seaweed
from .ceph import Ceph, missing_programs, start_ceph
from .fast_clouds import Kind, start_fast_cloud, uploaded_to_cloud
from .moto import start_moto
from .seaweed import start_seaweed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIB = 1 << 20

needs_ceph = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")


@pytest.fixture(scope="module", name="one_ceph")
def _one_ceph() -> Iterator[Ceph]:
    with start_ceph() as server:
        yield server


@pytest.fixture(name="client")
def _client(one_ceph: Ceph) -> Iterator[S3Client]:
    with contextlib.closing(one_ceph.client()) as client:
        yield client


def put_in_parts(client: S3Client, bucket: str, key: str, body: bytes) -> None:
    config = TransferConfig(multipart_chunksize=8 * MIB)
    client.upload_fileobj(io.BytesIO(body), bucket, key, Config=config)


def get(client: S3Client, bucket: str, key: str, start: int, length: int) -> bytes:
    http_range = f"bytes={start}-{start + length - 1}"
    return client.get_object(Bucket=bucket, Key=key, Range=http_range)["Body"].read()


def check_ranges(client: S3Client, bucket: str, key: str, body: bytes, count: int) -> int:
    """Compare `count` random ranges of an object with its body, and return their total size."""
    rng = random.Random(7)
    total = 0
    for _ in range(count):
        length = rng.choice([1, 4096, rng.randrange(1, len(body) // 8)])
        start = rng.randrange(len(body) - length + 1)
        # Not in the assert: pytest would take minutes to explain a difference.
        same = get(client, bucket, key, start, length) == body[start : start + length]
        assert same, f"{length} bytes at {start} differ"
        total += length
    return total


def pids_with(mark: str) -> list[int]:
    """Return the processes that have `mark` among their arguments or in their environment."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            texts = [(proc / name).read_bytes() for name in ("cmdline", "environ")]
            if any(mark.encode() in text for text in texts):
                found.append(int(proc.name))
    return found


def eventually(true: Callable[[], bool], timeout: float = 10) -> bool:
    deadline = time.monotonic() + timeout
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


@needs_ceph
def test_ceph_serves_exact_ranges_of_a_multipart_object(one_ceph: Ceph, client: S3Client) -> None:
    body = random.Random(1).randbytes(40 * MIB)
    client.create_bucket(Bucket="ranges")
    put_in_parts(client, "ranges", "multipart", body)

    total = check_ranges(client, "ranges", "multipart", body, 50)

    assert one_ceph.bytes_sent("ranges", "multipart") == (50, total)
    whole = client.get_object(Bucket="ranges", Key="multipart")["Body"].read() == body
    assert whole
    assert one_ceph.bytes_sent("ranges", "multipart") == (51, total + len(body))


@needs_ceph
def test_ops_log_tells_each_request(one_ceph: Ceph, client: S3Client) -> None:
    key = "a dir/ü+%20?.bin"
    client.create_bucket(Bucket="requests")
    client.put_object(Bucket="requests", Key=key, Body=bytes(1000))
    client.head_object(Bucket="requests", Key=key)
    get(client, "requests", key, 10, 100)
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket="requests", Key="none")
    client.list_objects_v2(Bucket="requests")

    ops = [op for op in one_ceph.ops() if op.bucket == "requests"]

    assert [(op.operation, op.method, op.key, op.http_status, op.bytes_sent) for op in ops[:4]] == [
        ("create_bucket", "PUT", "", 200, 0),
        ("put_obj", "PUT", key, 200, 0),
        ("get_obj", "HEAD", key, 200, 0),
        ("get_obj", "GET", key, 206, 100),
    ]
    assert [(op.operation, op.http_status) for op in ops[4:]] == [
        ("get_obj", 404),
        ("list_bucket", 200),
    ]
    assert (ops[3].http_range, ops[3].object_size) == ("bytes=10-109", 1000)
    assert one_ceph.bytes_sent("requests", key) == (1, 100)
    assert one_ceph.bytes_sent("requests", "none") == (0, 0)


@needs_ceph
def test_ops_log_counts_concurrent_requests(one_ceph: Ceph, client: S3Client) -> None:
    client.create_bucket(Bucket="concurrent")
    client.put_object(Bucket="concurrent", Key="key", Body=bytes(MIB))

    with ThreadPoolExecutor(8) as pool:
        for done in range(1, 4):
            list(pool.map(lambda start: get(client, "concurrent", "key", start, 5000), range(40)))
            assert one_ceph.bytes_sent("concurrent", "key") == (40 * done, 40 * done * 5000)


def test_ops_log_entries_may_share_a_line_and_be_partial(tmp_path: Path) -> None:
    ops_log = tmp_path / "ops.log"
    ops_log.write_text('{"uri":"GET /a/}{"}{"n":2}\n{"n":3}\n\n{"n":4,"uri":"GE')

    assert list(ceph._entries(ops_log)) == [{"uri": "GET /a/}{"}, {"n": 2}, {"n": 3}]


@needs_ceph
def test_ops_log_counts_a_get_broken_off(one_ceph: Ceph, client: S3Client) -> None:
    client.create_bucket(Bucket="broken-off")
    put_in_parts(client, "broken-off", "key", bytes(40 * MIB))

    with contextlib.closing(client.get_object(Bucket="broken-off", Key="key")["Body"]) as stream:
        stream.read(20 * MIB)

    assert eventually(lambda: one_ceph.bytes_sent("broken-off", "key")[0] == 1)
    assert 0 < one_ceph.bytes_sent("broken-off", "key")[1] < 40 * MIB


@needs_ceph
def test_two_cephs_at_once_share_nothing(one_ceph: Ceph, client: S3Client) -> None:
    client.create_bucket(Bucket="shared-name")
    client.put_object(Bucket="shared-name", Key="key", Body=b"first")

    with start_ceph(memstore_device_bytes=1 << 30) as other:
        with contextlib.closing(other.client()) as other_client:
            other_client.create_bucket(Bucket="shared-name")
            other_client.put_object(Bucket="shared-name", Key="key", Body=b"other")
            assert get(other_client, "shared-name", "key", 0, 5) == b"other"
        assert get(client, "shared-name", "key", 0, 5) == b"first"
        assert len(pids_with(str(other.directory))) == 3

    assert pids_with(str(other.directory)) == []
    assert not other.directory.exists()
    assert get(client, "shared-name", "key", 0, 5) == b"first"
    assert len(pids_with(str(one_ceph.directory))) == 3


@needs_ceph
def test_ceph_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ceph, "SCRATCH", tmp_path)
    monkeypatch.setattr(ceph, "_CONFIG", ceph._CONFIG.replace("beast endpoint={host}", "beast endpoint=192.0.2.1"))

    with pytest.raises(ServiceError, match=r"(?s)client\.rgw: exited .*192\.0\.2\.1"), start_ceph():
        pass

    assert pids_with(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


@needs_ceph
def test_no_ceph_outlives_its_killed_parent() -> None:
    code = (
        f"from {ceph.__name__} import start_ceph\n"
        "with start_ceph() as server:\n    print(server.directory, flush=True)\n    input()\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as parent:
        assert parent.stdout is not None
        directory = parent.stdout.readline().strip()
        try:
            assert len(pids_with(directory)) == 3
        finally:
            parent.send_signal(signal.SIGKILL)
    assert directory
    try:
        assert eventually(lambda: pids_with(directory) == [])
    finally:
        rmtree(directory)


def test_moto_serves_exact_ranges_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(moto, "SCRATCH", tmp_path)
    body = random.Random(2).randbytes(MIB)

    with start_moto() as server:
        mark = f"-p\0{server.endpoint_url.rpartition(':')[2]}\0"
        with contextlib.closing(server.client()) as client:
            client.create_bucket(Bucket="ranges")
            client.put_object(Bucket="ranges", Key="key", Body=body)
            check_ranges(client, "ranges", "key", body, 50)
        assert len(pids_with(mark)) == 1

    assert pids_with(mark) == []
    assert list(tmp_path.iterdir()) == []


def test_environment_names_this_server_only() -> None:
    env = S3Server("http://127.0.0.1:1", "key", "secret").environment()

    assert env["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert (env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]) == ("key", "secret")


def test_reserved_ports_are_disjoint() -> None:
    with reserved_ports() as some, reserved_ports() as others:
        assert set(some).isdisjoint(others)


@pytest.mark.slow
@pytest.mark.skipif(seaweed.missing_program() is not None, reason="SeaweedFS comes with the extra bench")
@pytest.mark.parametrize("kind", get_args(Kind))
async def test_the_fast_endpoint_serves_the_same_in_the_words_of_each_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Kind
) -> None:
    content = random.Random(1).randbytes(100_000)
    path = tmp_path / "root" / "bucket" / "dir" / "model"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    uploaded_to_cloud(path)
    with start_fast_cloud(kind, tmp_path / "root") as server:
        use_cloud(server, monkeypatch)
        options = MountOptions(store=server.store("bucket"), endpoint_url=server.environment().get("HF_ENDPOINT"))
        store = open_store(options, max_requests=2)
        page = await store.list_page("dir/")
        [generation] = page.objects
        read = bytearray()
        await store.read(await store.stat("dir/model"), 1000, 50_000, read.extend)
        await store.aclose()
    assert (generation.key, generation.size) == ("dir/model", len(content))
    assert bytes(read) == content[1000:51_000]


def test_seaweed_answers_over_https_to_who_trusts_it() -> None:
    with start_seaweed() as server:
        secure = server.over_https()
        with contextlib.closing(server.client()) as client, contextlib.closing(secure.client()) as other:
            client.create_bucket(Bucket="bucket")
            client.put_object(Bucket="bucket", Key="object", Body=b"body")
            assert other.get_object(Bucket="bucket", Key="object")["Body"].read() == b"body"
        assert server.ca_file is None
        assert secure.environment()["AWS_CA_BUNDLE"] == str(secure.ca_file)
        assert secure.pids == server.pids
        stranger = dataclasses.replace(secure, ca_file=None)
        with contextlib.closing(stranger.client()) as client, pytest.raises(SSLError):
            client.list_buckets()


def test_seaweed_returns_what_was_put() -> None:
    body = random.Random(11).randbytes(20 * MIB)
    with start_seaweed() as server, contextlib.closing(server.client()) as client:
        client.create_bucket(Bucket="bucket")
        put_in_parts(client, "bucket", "object", body)

        assert check_ranges(client, "bucket", "object", body, 20) > 0
