"""Tests of the test servers: exact counts, and nothing left behind."""

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

from . import seaweed
from .ceph import Ceph, _entries, missing_programs, start_ceph
from .fast_clouds import Kind, start_fast_cloud, uploaded_to_cloud
from .seaweed import start_seaweed

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIB = 1 << 20

needs_ceph = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")


@pytest.fixture(name="client")
def _client(ceph: Ceph) -> Iterator[S3Client]:
    with contextlib.closing(ceph.client()) as client:
        yield client


def put_in_parts(client: S3Client, bucket: str, key: str, body: bytes) -> None:
    config = TransferConfig(multipart_chunksize=8 * MIB)
    client.upload_fileobj(io.BytesIO(body), bucket, key, Config=config)


def get(client: S3Client, bucket: str, key: str, start: int, length: int) -> bytes:
    http_range = f"bytes={start}-{start + length - 1}"
    return client.get_object(Bucket=bucket, Key=key, Range=http_range)["Body"].read()


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
def test_ops_log_tells_each_request(ceph: Ceph, client: S3Client) -> None:
    key = "a dir/ü+%20?.bin"
    client.create_bucket(Bucket="requests")
    client.put_object(Bucket="requests", Key=key, Body=bytes(1000))
    client.head_object(Bucket="requests", Key=key)
    get(client, "requests", key, 10, 100)
    with pytest.raises(ClientError, match="NoSuchKey"):
        client.get_object(Bucket="requests", Key="none")
    client.list_objects_v2(Bucket="requests")

    ops = [op for op in ceph.ops() if op.bucket == "requests"]

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
    assert ceph.bytes_sent("requests", key) == (1, 100)
    assert ceph.bytes_sent("requests", "none") == (0, 0)


@needs_ceph
def test_ops_log_counts_concurrent_requests(ceph: Ceph, client: S3Client) -> None:
    client.create_bucket(Bucket="concurrent")
    client.put_object(Bucket="concurrent", Key="key", Body=bytes(MIB))

    with ThreadPoolExecutor(8) as pool:
        for done in range(1, 4):
            list(pool.map(lambda start: get(client, "concurrent", "key", start, 5000), range(40)))
            assert ceph.bytes_sent("concurrent", "key") == (40 * done, 40 * done * 5000)


def test_ops_log_entries_may_share_a_line_and_be_partial(tmp_path: Path) -> None:
    ops_log = tmp_path / "ops.log"
    ops_log.write_text('{"uri":"GET /a/}{"}{"n":2}\n{"n":3}\n\n{"n":4,"uri":"GE')

    assert list(_entries(ops_log)) == [{"uri": "GET /a/}{"}, {"n": 2}, {"n": 3}]


@needs_ceph
def test_ops_log_counts_a_get_broken_off(ceph: Ceph, client: S3Client) -> None:
    client.create_bucket(Bucket="broken-off")
    put_in_parts(client, "broken-off", "key", bytes(40 * MIB))

    with contextlib.closing(client.get_object(Bucket="broken-off", Key="key")["Body"]) as stream:
        stream.read(20 * MIB)

    assert eventually(lambda: ceph.bytes_sent("broken-off", "key")[0] == 1)
    assert 0 < ceph.bytes_sent("broken-off", "key")[1] < 40 * MIB


@needs_ceph
def test_no_ceph_outlives_its_killed_parent() -> None:
    code = (
        f"from {start_ceph.__module__} import start_ceph\n"
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
