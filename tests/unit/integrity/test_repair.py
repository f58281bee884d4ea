"""What is mended is counted once, pinned as before, and known to the next server; what prevents it passes."""

import errno
import sqlite3
from collections.abc import Callable
from functools import partial

import pytest
import trio

from tests.support.held import Held, begin, reached
from tests.support.parts import fail_to_sync, recorded_bytes, until
from tests.support.served import FakeBacking
from tests.unit.integrity.common import DAMAGED, Scene, counted, counts_of, down, opened
from trimsfs.errors import BlobDamagedError, InUseError, StoreUnavailableError, TransientStoreError
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.chunk_checks import held
from trimsfs.tiers.disk import maintenance
from trimsfs.tiers.mapping import mapped


async def test_a_chunk_that_is_verified_while_its_read_is_queued_is_not_counted_twice(scene: Scene) -> None:
    store = scene.store
    async with scene.serving(backing=None) as server:
        assert await server.content("a") == scene.content
    store.requests.clear()
    store.delete("small")  # it would be prefetched as the sibling of the others, and counted
    async with scene.serving(backing=None, cold_open="stream", retry_deadline=20.0) as server:
        most = server.fetcher._speed.limit.maximum
        gates = store.block(method="read")
        async with trio.open_nursery() as nursery:
            for number in range(most):
                store.put(f"other{number}", b"x")
                begin(nursery, server.content, f"other{number}")
            await until(lambda: server.fetcher.statistics().in_flight == most)
            reading = begin(nursery, server.read, await server.open("a"), 0, 10)
            await until(lambda: server.fetcher.statistics().waiting == 1)
            assert await server.outcome("verify", "a") == ("done", None)
            gates.set()
        assert reading == [scene.content[:10]]
        await until(lambda: server.fetcher.statistics().in_flight == 0)
        await server.disk.journal.flush()
        used, recorded = server.disk.statistics().used_bytes, await recorded_bytes(server.disk)
        assert (store.reads("a"), used - recorded) == ([], 0)  # all of it is here


async def test_a_chunk_that_is_mended_after_others_have_given_it_up_is_counted(scene: Scene) -> None:
    store = scene.store
    async with scene.serving(backing=None) as server:
        assert await server.content("a") == scene.content
    scene.damage()
    async with scene.serving(backing=None, cold_open="stream") as server:
        gate = store.block(method="read", key="a", offset=0, times=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.command, "verify", "a")
            await reached(gate)  # it is being fetched again
            handle = await server.open("a")
            down(store, method="read")
            with pytest.raises(StoreUnavailableError):
                await server.read(handle, 0, 10)  # finds the damage, and cannot be given it
            store._rules = [rule for rule in store._rules if rule.error is None]
            gate.set()
        assert await server.content("a") == scene.content
        await server.disk.journal.flush()
        assert server.disk.statistics().used_bytes == await recorded_bytes(server.disk) == len(scene.content)


async def test_chunks_that_did_not_reach_the_disk_are_given_back_once(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fdatasync fails, then the store is away when what was lost is to be mended."""
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 1000.0)
    async with scene.serving() as server:
        handle = await opened(server)
        blob = scene.blob(server)
        await fail_to_sync(server.disk, blob)
        assert blob.health.lost
        server.release(handle)
        down(scene.store, method="read")
        await server.outcome("verify", "a")
        scene.store.heal()
        await server.outcome("evict", "a")
        assert server.disk.statistics().used_bytes == await recorded_bytes(server.disk) == 0


async def test_a_pin_is_still_locked_after_it_has_been_mended(scene: Scene) -> None:
    async with scene.serving() as server:
        assert await server.outcome("pin", "a") == ("done", None)
        locked = server.host.statistics().locked_bytes
        scene.damage()
        down(scene.store, method="read")
        async with server.without_syncs():  # what is in use is quarantined, not dropped
            await until(lambda: server.users() == 0)
            await server.outcome("verify", "a")
        scene.store.heal()
        assert await server.content("a") == scene.content
        assert server.host.statistics().locked_bytes == locked
        await server.outcome("unpin", "a")


async def test_scrubbing_outlasts_fetch_processes_that_end(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ended(*_: object) -> int:
        raise TransientStoreError("the fetch process died")

    async with scene.serving(scrub_interval=0.1) as server:
        server.release(await opened(server))
        with monkeypatch.context() as context:
            context.setattr(server.integrity.comparer._copier, "checksum", ended)
            await trio.sleep(0.5)
        before = counts_of(server).scrubbed_bytes
        await until(lambda: counts_of(server).scrubbed_bytes > before)


@pytest.mark.parametrize("who", ["scrub", "compare", "doubt"])
async def test_want_of_descriptors_does_not_end_the_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    def none(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("trimsfs.integrity.quarantine.RETRY_INTERVAL_S", 0.1)
    scene.tells("md5")
    if who == "compare":
        down(scene.store, method="digest")
    async with scene.serving(scrub_interval=0.1 if who == "scrub" else 0.0) as server:
        handle = await opened(server)
        if who == "doubt":
            scene.damage()
            down(scene.store, method="read")
            assert await server.outcome("verify", "a") == DAMAGED
        elif who == "scrub":
            server.release(handle)
        with monkeypatch.context() as context:
            context.setattr("os.dup", none)
            context.setattr("os.open", none)
            scene.store.heal()
            await trio.sleep(0.5)
        await server.content("small")


async def test_the_next_server_knows_what_came_into_doubt_while_it_was_announced(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, ledger: Callable[[], Ledger]
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.3)
    backing = FakeBacking()
    backing.gate = trio.Event()
    serving = partial(scene.serving, backing=backing)
    scene.tells("sha256", b"something else")
    async with serving(ledger=ledger(), cold_open="stream") as server:
        handle = await server.open("a")
        await server.read(handle, 0, 10)
        await counted(server, doubtful=1)
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
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.3)
    async with scene.serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        await server.read(handle, 0, 10)
        await until(lambda: server.fetcher.statistics().in_flight == 0 and server.users() == 1)
        blob = scene.blob(server)
        blob.forget(3)
        server.disk.budget.add("a", -100)
        server.integrity.quarantine.add(blob, BlobDamagedError("a: damaged"))
        server.disk._state.unfinished.add(blob.token)
        giving_back = Held(monkeypatch, maintenance, "free_unrecorded")
        server.release(handle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.disk._maintenance._free_unfinished)
            await giving_back.reached()
            await trio.sleep(0.5)
            giving_back.go.set()
        await counted(server, doubtful=0)
        assert await server.content("a") == scene.content


@pytest.mark.parametrize("method", ["mark_synced", "used"])
async def test_an_index_that_fails_once_while_nothing_is_to_be_recorded_does_not_end_the_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.SYNC_INTERVAL_S", 0.1)
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.PATIENCE_S", 0.5)
    async with scene.serving() as server:
        handle = await opened(server)
        await trio.sleep(0.6)
        await server.disk.journal.flush()  # nothing is to be recorded from here on
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


async def test_a_file_that_a_program_has_mapped_is_not_evicted_while_it_is_scrubbed(scene: Scene) -> None:
    scene.store.delete("small")
    async with scene.serving(backing=None) as server:
        assert await server.content("a") == scene.content
        blob = scene.blob(server)

        async def scrub() -> None:
            with held(blob):
                await server.integrity.repair.check(blob, rate=1)

        with scene.file.open("rb") as file:
            view = mapped(file.fileno(), len(scene.content))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrub)
            await until(lambda: server.integrity.repair.checked_bytes > 0)
            with pytest.raises(InUseError):
                await server.disk.residencies.evict(blob.generation)
            del view
            assert await server.disk.residencies.evict(blob.generation) == len(scene.content)
            nursery.cancel_scope.cancel()
