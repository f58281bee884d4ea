"""What cannot be looked at is not told to be right, and ends no server."""

import time

import pytest
import trio

from tests.support.parts import blob_files
from tests.support.served import Server
from tests.unit.integrity.common import Scene, counted, counts_of, opened
from trimsfs.extras.gpu.cuda import CudaError
from trimsfs.types import Generation


async def forgotten(server: Server, scene: Scene) -> None:
    """A file is here, nobody uses it, it is damaged, and none more can be opened."""
    assert await server.content("a")
    await server.disk.journal.flush()
    await server.disk.journal.sync()
    server.disk._open_blobs._forget(most=0, looks=1)
    scene.damage()
    server.disk._state.open_files.most = 0


@pytest.mark.parametrize(
    "error", [CudaError("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"), OSError("the file has been truncated")]
)
async def test_a_copy_on_a_gpu_that_cannot_be_compared_ends_no_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def compare(_generation: Generation) -> None:
        raise error

    async with scene.serving(scrub_interval=0.2) as server:
        handle = await opened(server)
        monkeypatch.setattr(server.gpu, "compare", compare)
        scene.damage()
        await counted(server, repaired_chunks=1)
        await trio.sleep(0.5)
        assert await server.read(handle) == scene.content


async def test_what_cannot_be_looked_at_is_neither_scrubbed_nor_told_to_be_well(scene: Scene) -> None:
    async with scene.serving(backing=None) as server:
        await forgotten(server, scene)
        before = time.time()
        await server.integrity.scrubber.scrub(scene.store.generation("a"))
        assert counts_of(server).scrubbed_bytes == 0
        assert await server.disk.damage.next_to_scrub(before) is not None
        assert await server.outcome("verify", "a") == ("failed", "CacheUnusableError")


async def test_nothing_is_kept_of_a_file_that_is_not_here_when_it_is_verified(scene: Scene) -> None:
    async with scene.serving() as server:
        assert await server.outcome("verify", "a") == ("done", None)
        assert blob_files(scene.cache) == []
        assert await server.disk.residencies.all() == []


async def test_verify_does_not_tell_that_all_is_well_of_a_cache_that_cannot_be_used(scene: Scene) -> None:
    async with scene.serving() as server:
        server.disk._state.directory.problem = "the disk is gone"
        assert await server.outcome("verify", "a") == ("failed", "CacheUnusableError")
