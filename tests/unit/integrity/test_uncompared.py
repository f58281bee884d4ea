"""What has not been compared with the store is compared before it is given, where that is wanted, or later."""

import os
import sqlite3
import threading
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, blob_of, fail_to_sync, failing, flip_byte, until
from tests.support.served import Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import comes_right, digest_of, down, opened
from trimsfs.errors import TransientStoreError, TrimsError
from trimsfs.integrity.deferred import LONGEST_INTERVAL_S, Retries
from trimsfs.stores.digests import compute


async def test_what_could_not_be_verified_is_still_compared_later(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.deferred.RETRY_INTERVAL_S", 0.1)
    store.digests["a"] = digest_of(content, "md5", certain=False)
    store.corrupt("a", 77)
    down(store, method="digest")
    async with serving() as server:
        handle = await opened(server)
        await until(lambda: server.integrity.statistics().to_compare == 1)
        assert (await server.outcome("verify", "a"))[0] == "failed"
        store.heal()
        assert await comes_right(server, handle, content)


async def test_nothing_is_given_uncompared_while_the_index_cannot_be_written(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, so that the index cannot grow: what is here has not been compared."""
    store.digests["a"] = digest_of(content, "crc32c")
    store.corrupt("a", 77)
    async with serving(digests="wait") as server:
        monkeypatch.setattr(server.disk.index, "add_chunks", failing(sqlite3.SQLITE_FULL))
        try:
            found = await server.content("a")
        except TrimsError:
            return
        assert found == content


async def test_nothing_is_given_uncompared_while_no_digest_can_be_computed(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.digests["a"] = digest_of(content, "sha256")
    store.corrupt("a", 77)
    async with serving(digests="wait") as server:

        async def ended(*_: object) -> bytes:
            raise TransientStoreError("the fetch process died")

        monkeypatch.setattr(server.integrity.comparer._copier, "digest", ended)
        try:
            found = await server.content("a")
        except TrimsError:
            return
        assert found == content


async def test_no_more_than_wait_read_uncompared(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.opening.cold_open.MOST_WAITING", 1)
    store.digests["a"] = digest_of(content, "crc32c")
    store.corrupt("a", 77)
    async with serving(digests="wait") as server:
        gate = store.block(method="read", key="b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.content, "b")
            await until(lambda: gate.statistics().tasks_waiting > 0)
            try:
                found = await server.content("a")
            except TrimsError:
                found = content
            gate.set()
        assert found == content


async def test_a_bit_that_was_flipped_as_a_scrub_fetched_again_is_found(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    store.digests["a"] = digest_of(content, "crc32c")
    async with serving(scrub_interval=0.1) as server:
        handle = await opened(server)
        assert await server.read(handle) == content
        store.corrupt("a", 77)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        await until(lambda: server.integrity.statistics().repaired_chunks >= 1)
        assert await comes_right(server, handle, content)


async def test_verify_of_a_file_that_is_mended_wrong_by_two(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A chunk that a comparison has read already is damaged, and mended by a scrub with a flipped bit."""
    gate, began = threading.Event(), threading.Event()

    def computed(*arguments: object) -> bytes | None:
        found = compute(*arguments)  # type: ignore[arg-type]
        if not began.is_set():
            began.set()
            assert gate.wait(20)
        return found

    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    store.digests["a"] = digest_of(content, "md5", certain=False)
    async with serving() as server:
        handle = await opened(server)
        await until(began.is_set)
        store.corrupt("a", 77)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        async with server.disk.inspecting(store.generation("a")) as blob:
            await server.integrity.repair.check(blob)
        assert server.integrity.statistics().repaired_chunks == 1
        gate.set()
        await until(lambda: server.integrity.statistics().to_compare == 0)
        await trio.sleep(0.2)
        right = await server.read(handle) == content
        told = await server.attribute("a", "digest")
        assert right or told != str(store.digests["a"]), "wrong bytes, and told to have been compared"


@pytest.mark.parametrize("how", ["cut off", "not synced"])
async def test_what_is_closed_while_it_is_compared_does_not_end_the_server(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    gate, began = threading.Event(), threading.Event()

    def computed(*arguments: object) -> bytes | None:
        began.set()
        assert gate.wait(20)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    store.digests["a"] = digest_of(content, "md5", certain=False)
    async with serving() as server:
        server.release(await opened(server))
        await until(began.is_set)
        blob = blob_of(server.disk, store, "a")
        await until(lambda: blob.users == 0)
        if how == "cut off":
            (file,) = blob_files(tmp_path / "cache")
            os.truncate(file, 100)
            async with server.disk.using(store.generation("a")):
                pass
        else:
            await fail_to_sync(server.disk, blob)
        gate.set()
        await trio.sleep(1.2)
        assert await server.content("a") == content


@pytest.mark.parametrize("certain", [True, False])
async def test_what_is_mended_with_the_same_bytes_while_it_is_compared_is_compared_again(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certain: bool
) -> None:
    go, gate, began = threading.Event(), threading.Event(), threading.Event()

    def computed(*arguments: object) -> bytes | None:
        first = not began.is_set()
        began.set()
        assert go.wait(20)
        found = compute(*arguments)  # type: ignore[arg-type]
        if first:
            computed_once.set()
            assert gate.wait(20)
        return found

    computed_once = threading.Event()
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    store.digests["a"] = digest_of(content, "sha256" if certain else "md5", certain=certain)
    async with serving() as server:
        handle = await opened(server)
        await until(began.is_set)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        go.set()
        await until(computed_once.is_set)  # of damaged bytes
        async with server.disk.inspecting(store.generation("a")) as blob:
            await server.integrity.repair.check(blob, in_memory=True)  # as a scrub
            assert server.integrity.statistics().repaired_chunks == 1
            gate.set()
            await until(lambda: server.integrity.statistics().to_compare == 0)
            assert (blob.health.quarantine, server.integrity.comparer.trust.certain_only) == (None, False)
            assert blob.health.digest
        assert await server.read(handle) == content


async def test_an_open_of_what_is_here_does_not_wait_until_the_store_tells_a_digest(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.integrity.PATIENCE_S", 0.5)
    store.digests["a"] = digest_of(content, "crc32c")
    gate = store.block(method="digest")
    with trio.fail_after(20):
        async with serving(cold_open="auto") as server:
            assert await server.content("a") == content
            assert server.integrity.statistics().to_compare == 1
            gate.set()
            await until(lambda: server.integrity.statistics().compared == 1)


async def test_a_file_is_compared_again_ever_later_and_the_reason_told_once(
    serving: Serving, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    retries = Retries()
    async with serving() as server, server.disk.using(store.generation("a")) as blob:
        pauses = [retries.failed(blob, TransientStoreError("503")) for _ in range(10)]
        retries.failed(blob, TransientStoreError("500"))
    assert pauses[1:3] == [2 * pauses[0], 4 * pauses[0]]
    assert pauses[-1] == LONGEST_INTERVAL_S
    assert [line.rpartition(": ")[2] for line in caplog.messages if "not compared" in line] == ["503", "500"]
