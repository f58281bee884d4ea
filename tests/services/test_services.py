"""Tests of the test servers: exact counts, and the same content in the words of each store."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
from botocore.exceptions import ClientError

from tests.contract.backends import use_cloud
from trimsfs.options import MountOptions
from trimsfs.stores.open import open_store

from . import seaweed
from .ceph import Ceph, missing_programs
from .fast_clouds import Kind, start_fast_cloud, uploaded_to_cloud

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIB = 1 << 20

needs_ceph = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")


@pytest.fixture(name="client")
def _client(ceph: Ceph) -> Iterator[S3Client]:
    with contextlib.closing(ceph.client()) as client:
        yield client


def get(client: S3Client, bucket: str, key: str, start: int, length: int) -> bytes:
    http_range = f"bytes={start}-{start + length - 1}"
    return client.get_object(Bucket=bucket, Key=key, Range=http_range)["Body"].read()


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
    assert [(op.operation, op.http_status) for op in ops[4:]] == [("get_obj", 404), ("list_bucket", 200)]
    assert (ops[3].http_range, ops[3].object_size) == ("bytes=10-109", 1000)
    assert ceph.bytes_sent("requests", key) == (1, 100)
    assert ceph.bytes_sent("requests", "none") == (0, 0)


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
