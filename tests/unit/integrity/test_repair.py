"""What is mended is counted once, pinned as before, and known to the next server; what prevents it passes."""

import errno
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, blob_of, fail_to_sync, flip_byte, recorded_bytes, until
from tests.support.served import FakeBacking, Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of, down, opened
from trimsfs.errors import BlobDamagedError, InUseError, StoreUnavailableError, TransientStoreError
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.chunk_checks import held
from trimsfs.tiers.mapping import mapped


async def test_a_chunk_that_is_verified_while_its_read_is_queued_is_not_counted_twice(
    serving: Serving, store: MemoryStore, content: bytes, chunk_size: int
) -> None:
    async with serving(backing=None) as server:
        assert await server.content("a") == content
    store.requests.clear()
    store.delete("small")  # it would be prefetched as the sibling of the others, and counted
    async with serving(backing=None, cold_open="stream", retry_deadline=20.0) as server:
        most = server.fetcher._speed.limit.maximum
        names = [f"other{number}" for number in range(most)]
        for name in names:
            store.put(name, b"x")
        gates = store.block(method="read")
        async with trio.open_nursery() as nursery:

            async def content_of_one(name: str) -> None:
                await server.content(name)

            for name in names:
                nursery.start_soon(content_of_one, name)
            await until(lambda: server.fetcher.statistics().in_flight == most)
            handle = await server.open("a")
            read: list[bytes] = []

            async def read_a() -> None:
                read.append(await server.read(handle, 0, 10))

            nursery.start_soon(read_a)
            await until(lambda: server.fetcher.statistics().waiting == 1)
            assert await server.outcome("verify", "a") == ("done", None)
            gates.set()
        assert read == [content[:10]]
        await until(lambda: server.fetcher.statistics().in_flight == 0)
        await server.disk.flush()
        used, recorded = server.disk.statistics().used_bytes, await recorded_bytes(server.disk)
        assert (store.reads("a"), used - recorded) == ([], 0)  # all of it is here


async def test_a_chunk_that_is_mended_after_others_have_given_it_up_is_counted(
    serving: Serving, store: MemoryStore, content: bytes, chunk_size: int, tmp_path: Path
) -> None:
    async with serving(backing=None) as server:
        assert await server.content("a") == content
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    async with serving(backing=None, cold_open="stream") as server:
        gate = store.block(method="read", key="a", offset=0, times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.command, "verify", "a")
            await until(lambda: gate.statistics().tasks_waiting == 1)  # it is being fetched again
            handle = await server.open("a")
            down(store, method="read")
            with pytest.raises(StoreUnavailableError):
                await server.read(handle, 0, 10)  # finds the damage, and cannot be given it
            store._rules = [rule for rule in store._rules if rule.error is None]
            gate.set()
        assert await server.content("a") == content
        await server.disk.flush()
        assert server.disk.statistics().used_bytes == await recorded_bytes(server.disk) == len(content)


async def test_chunks_that_did_not_reach_the_disk_are_given_back_once(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fdatasync fails, then the store is away when what was lost is to be mended."""
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 1000.0)
    async with serving() as server:
        handle = await opened(server)
        blob = blob_of(server.disk, store, "a")

        await fail_to_sync(server.disk, blob)
        assert blob.health.lost
        server.release(handle)
        down(store, method="read")
        await server.outcome("verify", "a")
        store.heal()
        await server.outcome("evict", "a")
        assert server.disk.statistics().used_bytes == await recorded_bytes(server.disk) == 0


async def test_a_pin_is_still_locked_after_it_has_been_mended(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path
) -> None:
    async with serving() as server:
        assert await server.outcome("pin", "a") == ("done", None)
        locked = server.host.statistics().locked_bytes
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        store.fail(StoreUnavailableError("the store is down"), method="read", times=float("inf"))
        async with server.without_syncs():  # what is in use is quarantined, not dropped
            await until(lambda: server.users() == 0)
            await server.outcome("verify", "a")
        store.heal()
        assert await server.content("a") == content
        assert server.host.statistics().locked_bytes == locked
        await server.outcome("unpin", "a")


async def test_scrubbing_outlasts_fetch_processes_that_end(
    serving: Serving, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    async with serving(scrub_interval=0.1) as server:
        server.release(await opened(server))

        async def ended(*_: object) -> int:
            raise TransientStoreError("the fetch process died")

        with monkeypatch.context() as context:
            context.setattr(server.integrity.comparer._copier, "checksum", ended)
            await trio.sleep(0.5)
        before = server.integrity.statistics().scrubbed_bytes
        await until(lambda: server.integrity.statistics().scrubbed_bytes > before)


@pytest.mark.parametrize("who", ["scrub", "compare", "doubt"])
async def test_want_of_descriptors_does_not_end_the_server(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch, who: str, tmp_path: Path
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr("trimsfs.integrity.quarantine.RETRY_INTERVAL_S", 0.1)
    store.digests["a"] = digest_of(content, "md5", certain=False)
    if who == "compare":
        down(store, method="digest")
    async with serving(scrub_interval=0.1 if who == "scrub" else 0.0) as server:
        handle = await opened(server)
        if who == "doubt":
            flip_byte(blob_files(tmp_path / "cache")[0], 5)
            down(store, method="read")
            assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
        elif who == "scrub":
            server.release(handle)

        def none(*_: object, **__: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as context:
            context.setattr("os.dup", none)
            context.setattr("os.open", none)
            store.heal()
            await trio.sleep(0.5)
        await server.content("small")


async def test_the_next_server_knows_what_came_into_doubt_while_it_was_announced(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch, ledger: Callable[[], Ledger]
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.3)
    backing = FakeBacking()
    backing.gate = trio.Event()
    serving = partial(serving, backing=backing)
    store.digests["a"] = digest_of(b"something else", "sha256")
    async with serving(ledger=ledger(), cold_open="stream") as server:
        handle = await server.open("a")
        await server.read(handle, 0, 10)
        await until(lambda: server.integrity.statistics().doubtful == 1)
        backing.gate.set()
        await until(lambda: len(backing.opened) == 1)
        await trio.sleep(0.1)
        with pytest.raises(BlobDamagedError):
            await server.open("a")
    backing.gate = None
    async with serving(ledger=ledger()) as server:
        with pytest.raises(BlobDamagedError):
            await server.open("a")
    backing.dispose()


async def test_what_is_in_doubt_is_seen_to_though_it_is_being_given_back(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 1.0)
    go, began = threading.Event(), threading.Event()

    def give_back(*_: object) -> None:
        began.set()
        assert go.wait(20)

    async with serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        await server.read(handle, 0, 10)
        await until(lambda: server.fetcher.statistics().in_flight == 0 and server.users() == 1)
        blob = blob_of(server.disk, store, "a")
        blob.forget(3)
        server.disk._budget.add("a", -100)
        server.integrity.quarantine.add(blob, BlobDamagedError("a: damaged"))
        server.disk._state.unfinished.add(blob.token)
        monkeypatch.setattr("trimsfs.tiers.disk.maintenance.free_unrecorded", give_back)
        server.release(handle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.disk._maintenance._free_unfinished)
            assert await trio.to_thread.run_sync(began.wait, 10)
            await trio.sleep(1.3)
            go.set()
        await until(lambda: server.integrity.statistics().doubtful == 0)
        assert await server.content("a") == content


@pytest.mark.parametrize("method", ["mark_synced", "used"])
async def test_an_index_that_fails_once_while_nothing_is_to_be_recorded_does_not_end_the_server(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.SYNC_INTERVAL_S", 0.1)
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.PATIENCE_S", 0.5)
    async with serving() as server:
        handle = await opened(server)
        await trio.sleep(0.6)
        await server.disk.flush()  # nothing is to be recorded from here on
        failed: list[bool] = []
        real = getattr(server.disk.index, method)

        def once(*arguments: object) -> None:
            if not failed:
                failed.append(True)
                raise sqlite3.OperationalError("database is locked")
            real(*arguments)

        monkeypatch.setattr(server.disk.index, method, once)
        server.release(await server.open("a" if method == "used" else "b"))
        await trio.sleep(2)  # or it ends with CacheUnusableError
        assert failed
        server.release(handle)


async def test_a_file_that_a_program_has_mapped_is_not_evicted_while_it_is_scrubbed(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path
) -> None:
    store.delete("small")
    async with serving(backing=None) as server:
        assert await server.content("a") == content
        blob = blob_of(server.disk, store, "a")

        async def scrub() -> None:
            with held(blob):
                await server.integrity.repair.check(blob, rate=1)

        with blob_files(tmp_path / "cache")[0].open("rb") as file:
            view = mapped(file.fileno(), len(content))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrub)
            await until(lambda: server.integrity.repair.checked_bytes > 0)
            with pytest.raises(InUseError):
                await server.disk.evict(blob.generation)
            del view
            assert await server.disk.evict(blob.generation) == len(content)
            nursery.cancel_scope.cancel()
