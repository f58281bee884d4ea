import errno
import gc
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chunks import SMALL_CHUNK
from tests.support.parts import content_of, generation_of, piece, written
from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.ranges import chunk_count, chunk_length
from trimsfs.types import CHUNK_SIZE, ChunkRecord, Generation


def generation_of_size(size: int) -> Generation:
    return Generation(key="a", etag="e", size=size, modified_ns=0)


@pytest.fixture
def content(chunk_size: int) -> bytes:
    """Two whole chunks and a short one."""
    return content_of("a", 2 * chunk_size + 100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "blob"


@pytest.fixture
def blob(content: bytes, path: Path) -> Blob:
    """A new blob with its file, all chunks missing."""
    blob = Blob("token", generation_of("a", content), chunk_size=SMALL_CHUNK)
    blob.attach(path)
    return blob


def store(blob: Blob, content: bytes, *chunks: int) -> None:
    for chunk in chunks:
        blob.commit(written(blob, chunk, piece(content, chunk)))


def test_a_new_blob_is_a_sparse_private_file_of_the_objects_size(blob: Blob, path: Path, content: bytes) -> None:
    status = path.stat()
    assert status.st_size == len(content)
    assert status.st_blocks == 0
    assert status.st_mode & 0o777 == 0o600
    assert blob.attached
    assert list(blob.states) == [ChunkState.MISSING] * 3
    assert (blob.verified_bytes, blob.present_bytes, blob.complete) == (0, 0, False)


@pytest.mark.parametrize("size", [1, 10_000_000])
def test_a_file_of_another_size_is_replaced_and_not_changed(content: bytes, path: Path, size: int) -> None:
    """A program may still map it."""
    path.write_bytes(b"x" * size)
    blob = Blob("token", generation_of("a", content), chunk_size=SMALL_CHUNK)
    with path.open("rb") as before:
        assert not blob.attach(path)
        assert before.read() == b"x" * size
    assert path.read_bytes() == bytes(len(content))


def test_written_bytes_are_served_once_committed_also_across_chunks(
    blob: Blob, content: bytes, chunk_size: int
) -> None:
    record = written(blob, 1, piece(content, 1))
    assert not blob.readable(chunk_size, chunk_size + 1)
    blob.commit(record)
    assert blob.readable(chunk_size, 2 * chunk_size)
    assert blob.view(chunk_size, 2 * chunk_size) == piece(content, 1)
    assert not blob.readable(chunk_size - 1, chunk_size + 1)
    assert not blob.readable(chunk_size, 2 * chunk_size + 1)
    store(blob, content, 2, 0)
    assert blob.complete
    assert blob.readable(0, len(content))
    assert blob.view(0, len(content)) == content


def test_a_file_that_the_disk_does_not_give_names_the_object(
    blob: Blob, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(blob, content, 0)

    def fails(*_arguments: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("trimsfs.tiers.blob.mapped", fails)
    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(CacheUnusableError, match=f"{blob.generation.key}: cannot be read from the cache: Input/output"):
        blob.view(0, 1)


def test_what_an_earlier_server_recorded_is_served_once_it_is_checked(blob: Blob, content: bytes, path: Path) -> None:
    records = [written(blob, chunk, piece(content, chunk)) for chunk in range(3)]
    blob.detach()
    again = Blob("token", blob.generation, chunk_size=SMALL_CHUNK)
    assert again.attach(path)
    again.recall(records)
    assert list(again.states) == [ChunkState.UNVERIFIED] * 3
    assert not again.readable(0, 1)
    assert not again.complete
    assert (again.verified_bytes, again.present_bytes, again.missing_bytes) == (0, len(content), 0)
    for record in records:
        assert again.crc(record.chunk) == record.crc
        again.commit(record)
    assert again.complete
    assert again.view(0, len(content)) == content


# Counting


@given(size=st.integers(1, 10 * CHUNK_SIZE), data=st.data())
def test_counts_add_up_for_any_set_of_chunks(size: int, data: st.DataObject) -> None:
    chunks = st.integers(0, chunk_count(size, CHUNK_SIZE) - 1)
    blob = Blob("token", generation_of_size(size))
    verified: set[int] = set()
    for chunk, forget in data.draw(st.lists(st.tuples(chunks, st.booleans()))):
        if forget:
            blob.forget(chunk)
            verified.discard(chunk)
        else:
            blob.commit(ChunkRecord(chunk=chunk, length=chunk_length(chunk, size, CHUNK_SIZE), crc=0))
            verified.add(chunk)
    assert blob.verified_bytes == sum(chunk_length(chunk, size, CHUNK_SIZE) for chunk in verified)
    assert blob.present_bytes == blob.verified_bytes == size - blob.missing_bytes
    assert blob.complete == (len(verified) == chunk_count(size, CHUNK_SIZE))


def test_an_empty_object_is_complete_without_a_file() -> None:
    blob = Blob("token", generation_of_size(0))
    assert blob.complete
    assert not blob.attached
    assert (blob.verified_bytes, blob.present_bytes, blob.missing_bytes) == (0, 0, 0)
    assert blob.readable(0, 0)


# The end


def test_views_stay_valid_after_the_file_is_closed_and_removed(blob: Blob, content: bytes, path: Path) -> None:
    store(blob, content, 0, 1, 2)
    view = blob.view(0, len(content))
    descriptor = blob.fileno()
    blob.detach()
    path.unlink()
    assert not blob.attached
    assert view == content
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    blob.detach()


def test_a_failing_attach_leaks_no_descriptor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = os.listdir("/proc/self/fd")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "truncate", fail)
    blob = Blob("token", generation_of_size(10))
    with pytest.raises(OSError, match="No space left"):
        blob.attach(path)
    assert not blob.attached
    assert len(os.listdir("/proc/self/fd")) == len(before)
