"""Files of the cache that somebody truncates or extends while they are read, fetched or repaired."""

import os
from typing import Any

import pytest
import trio

from tests.support.held import Held, begin, reached, unless_refused
from tests.support.parts import until
from tests.support.served import served
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import CHUNKS, Scene, comes_right, counted, opened
from trimsfs.errors import BlobDamagedError
from trimsfs.integrity import chunk_checks
from trimsfs.stores.digests import Algorithm


async def test_what_is_cut_off_while_a_read_waits_for_more_is_not_read_as_zeros(scene: Scene) -> None:
    size = scene.chunk_size
    async with scene.serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        gate = scene.store.block(method="read", key="a", offset=size)
        assert await server.read(handle, 0, size) == scene.content[:size]
        async with trio.open_nursery() as nursery:
            reading = begin(nursery, server.read, handle, 0, 2 * size)
            await reached(gate)
            os.truncate(scene.file, 0)
            other = await server.open("a")  # finds that it is cut off
            gate.set()
        assert reading == [scene.content[: 2 * size]]
        server.release(other)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_chunk_that_is_cut_off_as_it_comes_is_not_believed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", 2048)
    store = MemoryStore({"a": scene.content}, streaming=streaming)
    async with served(store, scene.cache, chunk_size=scene.chunk_size, cold_open="stream") as server:
        handle = await server.open("a")
        gate = store.block(method="read", key="a", offset=0, after=8000)
        async with trio.open_nursery() as nursery:
            first = begin(nursery, server.read, handle, 0, scene.chunk_size)
            await reached(gate)
            os.truncate(scene.file, 0)
            server.release(await server.open("a"))  # finds that it is cut off
            second = begin(nursery, server.read, handle, 0, 100)
            await trio.sleep(0.1)
            gate.set()
        assert (first, second) == ([scene.content[: scene.chunk_size]], [scene.content[:100]])


async def test_a_file_that_was_cut_off_is_mended_soon_though_it_is_opened_meanwhile(scene: Scene) -> None:
    async with scene.serving() as server:
        await opened(server)
        os.truncate(scene.file, 100)
        gate = scene.store.block(method="read", key="a")
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        await reached(gate)  # it is being mended
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        gate.set()
        await until(lambda: scene.file.read_bytes() == scene.content)
        await counted(server, doubtful=0)
        await server.open("a")


async def test_a_file_that_was_made_longer_is_mended(scene: Scene) -> None:
    async with scene.serving() as server:
        await opened(server)
        os.truncate(scene.file, len(scene.content) + 1)
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        await counted(server, doubtful=0)
        await server.open("a")


@pytest.mark.parametrize("digest", [None, "crc32c"])
async def test_what_is_cut_off_again_while_it_is_mended_is_not_believed(scene: Scene, digest: Algorithm | None) -> None:
    if digest is not None:
        scene.tells(digest)
    async with scene.serving() as server:
        await opened(server)
        os.truncate(scene.file, 100)
        gate = scene.store.block(method="read", key="a", offset=3 * scene.chunk_size)
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        await reached(gate)  # three chunks have been mended
        assert scene.file.stat().st_size == 3 * scene.chunk_size
        os.truncate(scene.file, 0)
        with pytest.raises(BlobDamagedError):
            await server.open("a")  # finds that
        gate.set()
        await until(lambda: scene.file.stat().st_size == len(scene.content))
        await trio.sleep(0.3)
        assert await unless_refused(server.content("a")) in {None, scene.content}


async def test_what_is_cut_off_just_as_it_has_been_mended_is_not_believed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene.serving(backing=None) as server:
        handle = await server.open("a")
        assert await server.read(handle) == scene.content
        scene.damage()
        real, done = chunk_checks._copy, list[bool]()

        async def find() -> None:
            async with server.disk.blobs.using(scene.store.generation("a")):
                pass

        def copy(*arguments: int) -> None:
            real(*arguments)
            if not done:
                done.append(True)
                os.truncate(scene.file, 0)
                trio.from_thread.run(find)

        monkeypatch.setattr(chunk_checks, "_copy", copy)
        with trio.fail_after(10):
            await server.outcome("verify", "a")
        assert done
        assert await unless_refused(server.read(handle, 0, 100)) in {None, scene.content[:100]}


async def test_what_is_cut_off_again_while_that_is_recorded_is_not_read_as_zeros(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene.serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        assert await server.read(handle) == scene.content
        await server.disk.journal.flush()
        recording = Held(monkeypatch, server.disk.index, "remove_chunks")
        os.truncate(scene.file, 100)
        async with trio.open_nursery() as nursery:
            opening = begin(nursery, server.open, "a")
            await recording.reached()
            assert await server.read(handle, 0, scene.chunk_size) == scene.content[: scene.chunk_size]
            os.truncate(scene.file, 100)
            recording.go.set()
        server.release(opening[0])
        assert await comes_right(server, handle, scene.content)


async def test_what_is_cut_off_just_as_it_is_found_again_ends_no_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene.serving(backing=None) as server:
        server.release(await server.open("a"))
        assert await server.content("a") == scene.content
        await server.disk.journal.flush()
    real, done = os.open, list[bool]()

    def opened(path: Any, *arguments: Any, **more: Any) -> int:
        if not done and str(path) == str(scene.file):
            done.append(True)
            os.truncate(scene.file, 100)
        return real(path, *arguments, **more)

    monkeypatch.setattr("trimsfs.tiers.blob.os.open", opened)
    async with scene.serving(backing=None, scrub_interval=0.1) as server:
        await until(lambda: bool(done))
        await trio.sleep(0.3)
        assert await server.content("a") == scene.content


@pytest.mark.parametrize("digest", [None, "crc32c", "md5"])
async def test_what_is_cut_off_before_the_rest_comes_is_not_read_as_zeros(
    scene: Scene, digest: Algorithm | None
) -> None:
    size = scene.chunk_size
    if digest is not None:
        scene.tells(digest)
    async with scene.serving(backing=None, cold_open="stream") as server:
        gates = [scene.store.block(method="read", key="a", offset=chunk * size) for chunk in range(1, CHUNKS)]
        handle = await server.open("a")
        assert await server.read(handle, 0, size) == scene.content[:size]
        os.truncate(scene.file, 0)
        for gate in gates:
            gate.set()
        assert await server.read(handle, size) == scene.content[size:]
        assert await comes_right(server, handle, scene.content)
        await trio.sleep(0.5)
        assert await server.content("a") == scene.content
        assert await server.read(handle) == scene.content
