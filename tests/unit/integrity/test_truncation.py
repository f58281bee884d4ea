"""Files of the cache that somebody truncates or extends while they are read, fetched or repaired."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.parts import blob_files, flip_byte, until
from tests.support.served import Serving, served
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import CHUNKS, comes_right, digest_of, opened
from trimsfs.errors import BlobDamagedError, TrimsError
from trimsfs.integrity import chunk_checks
from trimsfs.stores.digests import Algorithm


async def test_what_is_cut_off_while_a_read_waits_for_more_is_not_read_as_zeros(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, chunk_size: int
) -> None:
    async with serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        gate = store.block(method="read", key="a", offset=chunk_size)
        assert await server.read(handle, 0, chunk_size) == content[:chunk_size]
        found = []

        async def read() -> None:
            found.append(await server.read(handle, 0, 2 * chunk_size))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await until(lambda: gate.statistics().tasks_waiting > 0)
            (file,) = blob_files(tmp_path / "cache")
            os.truncate(file, 0)
            other = await server.open("a")  # finds that it is cut off
            gate.set()
        assert found == [content[: 2 * chunk_size]]
        server.release(other)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_chunk_that_is_cut_off_as_it_comes_is_not_believed(
    tmp_path: Path, chunk_size: int, content: bytes, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", 2048)
    store = MemoryStore({"a": content}, streaming=streaming)
    async with served(store, tmp_path / "cache", chunk_size=chunk_size, cold_open="stream") as server:
        handle = await server.open("a")
        gate = store.block(method="read", key="a", offset=0, after=8000)
        found = []

        async def read(size: int) -> None:
            found.append(await server.read(handle, 0, size) == content[:size])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, chunk_size)
            await until(lambda: gate.statistics().tasks_waiting > 0)
            (file,) = blob_files(tmp_path / "cache")
            os.truncate(file, 0)
            server.release(await server.open("a"))  # finds that it is cut off
            nursery.start_soon(read, 100)
            await trio.sleep(0.1)
            gate.set()
        assert found == [True, True]


async def test_a_file_that_was_cut_off_is_mended_soon_though_it_is_opened_meanwhile(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.05)
    async with serving() as server:
        await opened(server)
        (file,) = blob_files(tmp_path / "cache")
        os.truncate(file, 100)
        gate = store.block(method="read", key="a")
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        await until(lambda: gate.statistics().tasks_waiting == 1)  # it is being mended
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        gate.set()
        await until(lambda: file.read_bytes() == content)
        await until(lambda: server.integrity.statistics().doubtful == 0)
        await server.open("a")


async def test_a_file_that_was_made_longer_is_mended(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.05)
    async with serving() as server:
        await opened(server)
        (file,) = blob_files(tmp_path / "cache")
        os.truncate(file, len(content) + 1)
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        await until(lambda: server.integrity.statistics().doubtful == 0)
        await server.open("a")


@pytest.mark.parametrize("digest", ["none", "crc32c"])
async def test_what_is_cut_off_again_while_it_is_mended_is_not_believed(
    serving: Serving,
    store: MemoryStore,
    content: bytes,
    chunk_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    digest: str,
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.05)
    if digest == "crc32c":
        store.digests["a"] = digest_of(content, "crc32c")
    async with serving() as server:
        await opened(server)
        (file,) = blob_files(tmp_path / "cache")
        os.truncate(file, 100)
        gate = store.block(method="read", key="a", offset=3 * chunk_size)
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        await until(lambda: gate.statistics().tasks_waiting == 1)  # three chunks have been mended
        assert file.stat().st_size == 3 * chunk_size
        os.truncate(file, 0)
        with pytest.raises(BlobDamagedError):
            await server.open("a")  # finds that
        gate.set()
        await until(lambda: file.stat().st_size == len(content))
        await trio.sleep(0.3)
        try:
            handle = await server.open("a")
        except BlobDamagedError:
            return  # nobody gets it
        assert await server.read(handle) == content


async def test_what_is_cut_off_just_as_it_has_been_mended_is_not_believed(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(backing=None) as server:
        handle = await server.open("a")
        assert await server.read(handle) == content
        (file,) = blob_files(tmp_path / "cache")
        flip_byte(file, 5)
        real = chunk_checks._copy
        done: list[bool] = []

        async def find() -> None:
            async with server.disk.using(store.generation("a")):
                pass

        def copy(*arguments: int) -> None:
            real(*arguments)
            if not done:
                done.append(True)
                os.truncate(file, 0)
                trio.from_thread.run(find)

        monkeypatch.setattr("trimsfs.integrity.chunk_checks._copy", copy)
        with trio.fail_after(10):
            await server.outcome("verify", "a")
        assert done
        try:
            found = await server.read(handle, 0, 100)
        except TrimsError:
            return
        assert found == content[:100]


async def test_what_is_cut_off_again_while_that_is_recorded_is_not_read_as_zeros(
    serving: Serving,
    store: MemoryStore,
    content: bytes,
    tmp_path: Path,
    chunk_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        assert await server.read(handle) == content
        await server.disk.flush()
        (file,) = blob_files(tmp_path / "cache")
        noting, gate = threading.Event(), threading.Event()
        real = server.disk.index.remove_chunks

        def remove(*arguments: object) -> None:
            noting.set()
            assert gate.wait(20)
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(server.disk.index, "remove_chunks", remove)
        os.truncate(file, 100)
        async with trio.open_nursery() as nursery:

            async def other() -> None:
                server.release(await server.open("a"))

            nursery.start_soon(other)
            await until(noting.is_set)
            assert await server.read(handle, 0, chunk_size) == content[:chunk_size]
            os.truncate(file, 100)
            gate.set()
        assert await comes_right(server, handle, content)


async def test_what_is_cut_off_just_as_it_is_found_again_ends_no_server(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    async with serving(backing=None) as server:
        server.release(await server.open("a"))
        assert await server.content("a") == content
        await server.disk.flush()
    (file,) = blob_files(tmp_path / "cache")
    real, done = os.open, list[bool]()

    def opened(path: Any, *arguments: Any, **more: Any) -> int:
        if not done and str(path) == str(file):
            done.append(True)
            os.truncate(file, 100)
        return real(path, *arguments, **more)

    monkeypatch.setattr("trimsfs.tiers.blob.os.open", opened)
    async with serving(backing=None, scrub_interval=0.1) as server:
        await until(lambda: bool(done))
        await trio.sleep(0.3)
        assert await server.content("a") == content


@pytest.mark.parametrize("digest", [None, "crc32c", "md5"])
async def test_what_is_cut_off_before_the_rest_comes_is_not_read_as_zeros(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, chunk_size: int, digest: Algorithm | None
) -> None:
    if digest is not None:
        store.digests["a"] = digest_of(content, digest, certain=digest == "crc32c")
    async with serving(backing=None, cold_open="stream") as server:
        gates = [store.block(method="read", key="a", offset=chunk * chunk_size) for chunk in range(1, CHUNKS)]
        handle = await server.open("a")
        assert await server.read(handle, 0, chunk_size) == content[:chunk_size]
        (file,) = blob_files(tmp_path / "cache")
        os.truncate(file, 0)
        for gate in gates:
            gate.set()
        found = await server.read(handle, chunk_size)
        assert found == content[chunk_size:]
        assert await comes_right(server, handle, content)
        await trio.sleep(0.5)
        assert await server.content("a") == content
        assert await server.read(handle) == content
