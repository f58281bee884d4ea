"""What stores tell of the digest of an object is the digest of its bytes."""

import io
import os
import random
from contextlib import aclosing
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from tests.contract.backends import Backend, DirectoryBackend, S3Backend
from trimsfs.errors import ObjectChangedError, ObjectNotFoundError
from trimsfs.stores.base import Store
from trimsfs.stores.digests import MIB, Digest, compute

SIZE = 20 * MIB + 5
CONTENT = random.Random(3).randbytes(SIZE)


def opened(backend: Backend) -> aclosing[Store]:
    return aclosing(backend.open())


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    (tmp_path / "content").write_bytes(CONTENT)
    return os.open(tmp_path / "content", os.O_RDONLY)


async def told(backend: Backend, key: str = "model") -> Digest | None:
    async with opened(backend) as store:
        return await store.digest(await store.stat(key))


def is_right(digest: Digest | None, descriptor: int) -> bool:
    assert digest is not None
    return digest.value in {
        compute(descriptor, SIZE, digest.algorithm, part_size) for part_size in digest.part_sizes(SIZE)
    }


@pytest.mark.promise("digest")
async def test_of_an_object_put_at_once(s3: S3Backend, descriptor: int) -> None:
    s3.put("model", CONTENT)
    digest = await told(s3)
    assert digest is not None
    assert digest.parts == 0
    assert is_right(digest, descriptor)


@pytest.mark.parametrize("part_size", [8 * MIB, 7 * MIB])
async def test_of_an_object_put_in_parts(s3: S3Backend, descriptor: int, part_size: int) -> None:
    config = TransferConfig(multipart_chunksize=part_size, multipart_threshold=part_size)
    s3.client.upload_fileobj(io.BytesIO(CONTENT), s3.bucket, "model", Config=config)
    digest = await told(s3)
    assert digest is not None
    assert digest.parts == 3
    assert is_right(digest, descriptor)


@pytest.mark.parametrize("algorithm", ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"])
async def test_of_an_object_put_with_a_checksum(s3: S3Backend, descriptor: int, algorithm: str) -> None:
    """Ceph keeps none and has its ETag; moto keeps it."""
    s3.client.put_object(Bucket=s3.bucket, Key="model", Body=CONTENT, ChecksumAlgorithm=algorithm)  # type: ignore[arg-type]
    digest = await told(s3)
    assert digest is not None
    assert digest.algorithm in {"md5", algorithm.lower()}
    assert is_right(digest, descriptor)


async def test_small_objects_take_no_request(s3: S3Backend, descriptor: int) -> None:
    s3.put("model", CONTENT[:1000])
    async with opened(s3) as store:
        generation = await store.stat("model")
        s3.delete("model")
        digest = await store.digest(generation)
        assert digest is not None
        assert digest.value == compute(descriptor, 1000, "md5", 0)
        with pytest.raises(ObjectNotFoundError):
            await store.digest(generation, certain=True)


async def test_of_what_has_been_replaced_there_is_none(s3: S3Backend) -> None:
    s3.put("model", CONTENT)
    async with opened(s3) as store:
        generation = await store.stat("model")
        s3.put("model", CONTENT[::-1])
        with pytest.raises(ObjectChangedError):
            await store.digest(generation)


@pytest.mark.parametrize("scheme", ["", "local://"])
async def test_directories_tell_none(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "root").mkdir()
    backend = DirectoryBackend(tmp_path / "root", scheme)
    backend.put("model", CONTENT)
    assert await told(backend) is None
