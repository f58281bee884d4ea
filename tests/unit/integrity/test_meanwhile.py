"""What changes while something else is being done about a file."""

import contextlib
import os
import threading
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, blob_of, flip_byte, until
from tests.support.served import FakeBacking, Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import comes_right, digest_of, down, opened
from trimsfs.errors import StoreUnavailableError, TrimsError
from trimsfs.integrity import chunk_checks
from trimsfs.stores.digests import compute


async def test_a_comparison_while_other_bytes_are_written_does_not_count(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scrub mends with a flipped bit; meanwhile what was put off is compared (CRC32C of the records)."""
    monkeypatch.setattr("trimsfs.integrity.deferred.RETRY_INTERVAL_S", 0.1)
    store.digests["a"] = digest_of(content, "crc32c")
    down(store, method="digest")
    writing, gate = threading.Event(), threading.Event()
    real = chunk_checks._copy

    def copy(*arguments: int) -> None:
        writing.set()
        assert gate.wait(20)
        real(*arguments)

    monkeypatch.setattr("trimsfs.integrity.chunk_checks._copy", copy)
    async with serving() as server:
        handle = await opened(server)
        await until(lambda: server.integrity.statistics().to_compare == 1)
        store.corrupt("a", 77)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.integrity.scrubber.scrub, store.generation("a"))
            await until(writing.is_set)
            store.heal()
            await until(lambda: server.integrity.statistics().to_compare == 0)
            gate.set()
        assert await comes_right(server, handle, content)


@pytest.mark.parametrize("mode", ["wait", "auto"])
async def test_what_is_lost_while_it_is_announced_is_compared_before(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, mode: str
) -> None:
    store.digests["a"] = digest_of(content, "crc32c")
    backing = FakeBacking()
    backing.gate = trio.Event()
    async with serving(digests=mode, backing=backing) as server:
        found: list[bytes] = []

        async def read() -> None:
            handle = await server.open("a")
            found.append(await server.read(handle))
            handles.append(handle)

        handles: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await until(
                lambda: (
                    (b := server.disk.known(store.generation("a").token(store.identity))) is not None
                    and b.health.compared
                )
            )
            blob = blob_of(server.disk, store, "a")
            await trio.sleep(0.1)
            (file,) = blob_files(tmp_path / "cache")
            store.corrupt("a", 77)
            os.truncate(file, 100)
            async with server.disk.using(store.generation("a")) as other:
                assert other is blob
                await server.fetcher.fetch_all(blob)
            assert blob.complete
            backing.gate.set()
        await trio.sleep(1.5)
        assert found == [content]
        assert await server.read(handles[0]) == content


async def test_what_is_damaged_stays_in_doubt_though_the_store_fails(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.1)
    store.digests["a"] = digest_of(content, "crc32c")
    async with serving(digests="wait", backing=None) as server:
        handle = await server.open("a")
        assert await server.read(handle) == content
        blob = blob_of(server.disk, store, "a")
        await server.disk.damage.set_digest(blob, None)  # as when it has been mended with other bytes
        gate = store.block(method="digest")
        down(store, method="digest")
        async with trio.open_nursery() as nursery:

            async def other() -> None:
                with contextlib.suppress(TrimsError):
                    server.release(await server.open("a"))

            nursery.start_soon(other)
            await until(lambda: gate.statistics().tasks_waiting > 0)
            flip_byte(blob_files(tmp_path / "cache")[0], 5)
            down(store)
            assert (await server.outcome("verify", "a"))[0] == "failed"
            assert blob.health.quarantined
            gate.set()
        await trio.sleep(1)
        try:
            found = await server.read(handle)
        except TrimsError:
            return
        assert found == content


@pytest.mark.parametrize("certain", [True, False])
async def test_damage_in_the_cache_is_not_taken_for_the_stores(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certain: bool
) -> None:
    began, gate = threading.Event(), threading.Event()

    def computed(*arguments: object) -> bytes | None:
        began.set()
        assert gate.wait(20)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    store.digests["a"] = digest_of(content, "sha256" if certain else "md5", certain=certain)
    async with serving() as server:
        handle = await opened(server)
        await until(began.is_set)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        gate.set()
        await until(lambda: server.integrity.statistics().to_compare == 0)
        assert await server.read(handle) == content


async def test_a_fetch_that_fails_does_not_leave_other_bytes_in_a_chunk_that_has_been_mended(
    serving: Serving,
    store: MemoryStore,
    content: bytes,
    tmp_path: Path,
    chunk_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store that tells only at the end that the object has been replaced."""
    writing, gate = threading.Event(), threading.Event()
    real = chunk_checks._copy

    def copy(*arguments: int) -> None:
        if not writing.is_set():
            writing.set()
            assert gate.wait(20)
        real(*arguments)

    monkeypatch.setattr("trimsfs.integrity.chunk_checks._copy", copy)
    async with serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        assert await server.read(handle) == content
        await server.disk.flush()
        (file,) = blob_files(tmp_path / "cache")
        flip_byte(file, 5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.integrity.scrubber.scrub, store.generation("a"))
            await until(writing.is_set)  # chunk 0 has been fetched again
            os.truncate(file, 0)
            server.release(await server.open("a"))  # finds that
            store.fail(StoreUnavailableError("fails at the end"), method="read", offset=0)
            held = store.block(method="read", offset=0, times=1)
            store._rules.reverse()  # waits, then fails

            async def read() -> None:
                try:
                    found.append(await server.read(handle, 0, 100))
                except TrimsError as error:
                    found.append(error)

            found: list[object] = []
            nursery.start_soon(read)
            await until(lambda: held.statistics().tasks_waiting > 0)
            gate.set()
            await until(lambda: server.integrity.statistics().repaired_chunks == 1)
            held.set()
            await until(lambda: bool(found))
        assert await server.read(handle, 0, 100) == content[:100], found


async def test_what_a_verify_that_is_closed_has_mended_is_compared(
    serving: Serving,
    store: MemoryStore,
    content: bytes,
    chunk_size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimsfs.integrity.deferred.RETRY_INTERVAL_S", 0.1)
    store.digests["a"] = digest_of(content, "crc32c")
    async with serving() as server:
        handle = await opened(server)
        (file,) = blob_files(tmp_path / "cache")
        flip_byte(file, 5)
        flip_byte(file, 2 * chunk_size + 5)
        store.corrupt("a", 77)  # one bit flips on the way
        gate = store.block(method="read", key="a", offset=2 * chunk_size)
        command = await server.open(await server.control_file("a", "verify"))
        await until(lambda: gate.statistics().tasks_waiting > 0)
        server.release(command)
        await trio.sleep(0.1)
        gate.set()
        blob = blob_of(server.disk, store, "a")
        await trio.sleep(2)
        server.release(await server.open("a"))  # nor is it compared when it is opened
        await until(lambda: blob.health.compared)
        assert (await server.read(handle))[:chunk_size] == content[:chunk_size], "wrong bytes"
