"""What cannot be looked at is not told to be right, and ends no server."""

import time
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, flip_byte, until
from tests.support.served import Server, Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import opened
from trimsfs.extras.gpu.cuda import CudaError
from trimsfs.types import Generation


async def forgotten(server: Server, directory: Path) -> None:
    """A file is here, nobody uses it, it is damaged, and none more can be opened."""
    assert await server.content("a")
    await server.disk.flush()
    await server.disk._journal.sync()
    server.disk._open_blobs._forget(most=0, looks=1)
    flip_byte(blob_files(directory)[0], 5)
    server.disk._state.open_files.most = 0


@pytest.mark.parametrize(
    "error", [CudaError("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"), OSError("the file has been truncated")]
)
async def test_a_copy_on_a_gpu_that_cannot_be_compared_ends_no_server(
    serving: Serving, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)

    async def compare(_generation: Generation) -> None:
        raise error

    async with serving(scrub_interval=0.2) as server:
        handle = await opened(server)
        monkeypatch.setattr(server.gpu, "compare", compare)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        await until(lambda: server.integrity.statistics().repaired_chunks == 1)
        await trio.sleep(0.5)
        assert await server.read(handle) == content


async def test_what_could_not_be_scrubbed_is_not_recorded_as_right(
    serving: Serving, store: MemoryStore, tmp_path: Path
) -> None:
    async with serving(backing=None) as server:
        await forgotten(server, tmp_path / "cache")
        before = time.time()
        await server.integrity.scrubber.scrub(store.generation("a"))
        assert server.integrity.statistics().scrubbed_bytes == 0
        assert await server.disk.damage.next_to_scrub(before) is not None


async def test_verify_does_not_tell_that_all_is_well_of_what_it_cannot_look_at(
    serving: Serving, tmp_path: Path
) -> None:
    async with serving(backing=None) as server:
        await forgotten(server, tmp_path / "cache")
        assert await server.outcome("verify", "a") == ("failed", "CacheUnusableError")


async def test_nothing_is_kept_of_a_file_that_is_not_here_when_it_is_verified(serving: Serving, tmp_path: Path) -> None:
    async with serving() as server:
        assert await server.outcome("verify", "a") == ("done", None)
        assert blob_files(tmp_path / "cache") == []
        assert await server.disk.residencies() == []


async def test_verify_does_not_tell_that_all_is_well_of_a_cache_that_cannot_be_used(serving: Serving) -> None:
    async with serving() as server:
        server.disk.unusable = "the disk is gone"
        assert await server.outcome("verify", "a") == ("failed", "CacheUnusableError")
