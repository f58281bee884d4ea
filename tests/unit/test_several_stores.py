"""A server of several stores: one that fails, or is slow, holds up its own paths only."""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from tests.support.parts import until
from tests.support.served import OWNER, STRANGER, Server, Serving
from tests.support.stores import MemoryStore
from trimsfs.control.metrics import labelled, parse
from trimsfs.errors import ObjectChangedError, StoreUnavailableError, TransientStoreError
from trimsfs.handover.ledger import Ledger
from trimsfs.namespace import directory
from trimsfs.stores import circuit_breaker

DEADLINE_S = 0.6
MODEL, BESIDE = os.urandom(20_000), os.urandom(30_000)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails is probed often, told of soon, and not remembered for long."""
    monkeypatch.setattr(circuit_breaker, "PROBE_INTERVAL_S", 0.05)
    monkeypatch.setattr(circuit_breaker, "TOLD_AFTER_S", 0.1)
    monkeypatch.setattr(circuit_breaker, "FORGOTTEN_AFTER_S", 0.5)
    monkeypatch.setattr(directory, "STALE_RETRY_S", 0.5)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"model": MODEL, "d/other": MODEL[:100]}, identity="memory://main")


@pytest.fixture
def beside() -> MemoryStore:
    return MemoryStore({"model": BESIDE, "pinned": BESIDE[:500]}, identity="memory://beside")


@pytest.fixture
def serving(serving: Serving, beside: MemoryStore) -> Serving:
    return partial(serving, beside={"hub/beside": beside}, retry_deadline=DEADLINE_S)


def away(store: MemoryStore) -> None:
    store.fail(TransientStoreError("503 Slow Down"), times=float("inf"))


async def test_a_store_that_is_away_fails_its_own_paths_only(
    server: Server, store: MemoryStore, beside: MemoryStore
) -> None:
    away(beside)

    with pytest.raises(StoreUnavailableError):
        await server.content("hub/beside/model")
    before = len(beside.requests)
    assert await server.content("main/model") == MODEL
    assert await server.content("main/d/other") == MODEL[:100]
    assert await server.listing("hub") == ["beside"], "directories above a path, and itself, need no store"
    assert server.components.breakers.of("hub/beside/x").open
    assert not server.components.breakers.of("main/x").failing
    assert len(beside.requests) - before <= 20, "only the probes"


async def test_what_is_cached_of_a_store_that_is_away_is_read(server: Server, beside: MemoryStore) -> None:
    await server.content("hub/beside/model")
    away(beside)
    with pytest.raises(StoreUnavailableError):
        await server.content("hub/beside/pinned")

    assert await server.content("hub/beside/model") == BESIDE


async def test_requests_to_a_store_that_hangs_take_none_of_the_others(
    server: Server, store: MemoryStore, beside: MemoryStore
) -> None:
    """More readers than requests may be under way at once."""
    for number in range(40):
        beside.put(f"slow/{number:02}", os.urandom(10_000))
    gate = beside.block(method="read")
    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(server.content, f"hub/beside/slow/{number:02}")
        most = server.components.fetcher.statistics().request_limit // 2
        await until(lambda: beside.under_way >= most)
        with trio.fail_after(5):
            assert await server.content("main/model") == MODEL
        gate.set()


async def test_status_and_metrics_name_each_store(server: Server, beside: MemoryStore) -> None:
    await server.content("main/model")
    away(beside)
    with pytest.raises(StoreUnavailableError):
        await server.content("hub/beside/model")

    facts = server.control._reports._facts()
    text = (await server.control._reports.metrics(OWNER)).decode()
    assert "503" in str(facts["store_problem"])
    assert str(facts["store_problem"]).startswith("/hub/beside: ")
    told = {each["path"]: each for each in facts["stores"]}  # type: ignore[attr-defined]
    assert (told["main"]["store"], told["main"]["problem"]) == ("memory://main", None)
    assert "503" in told["hub/beside"]["problem"]
    by_store = labelled(text, "store")
    assert by_store["main"]["trimsfs_stores_circuit_open"] == 0
    assert by_store["hub/beside"]["trimsfs_stores_circuit_open"] == 1
    total = parse(text)["trimsfs_store_requests_total"]
    assert total == sum(each["trimsfs_stores_requests_total"] for each in by_store.values())
    assert parse(text)["trimsfs_store_circuit_open"] == 1
    stranger = (await server.control._reports.metrics(STRANGER)).decode()
    assert "hub/beside" not in stranger, "it would tell what others read"


async def test_a_command_on_all_goes_on_without_a_store_that_is_away(server: Server, beside: MemoryStore) -> None:
    away(beside)

    last = (await server.command("warm-disk", ""))[-1]

    assert (last["state"], last["kind"]) == ("failed", "StoreUnavailableError")
    assert (await server.info("main/model"))["residency"]["disk"] == len(MODEL)


async def test_a_job_on_all_waits_for_a_store_that_is_away(server: Server, beside: MemoryStore) -> None:
    away(beside)
    await server.command("background-warm-disk", "")
    await until(lambda: beside.count("list_page") > 2)

    beside.heal()

    (job,) = server.components.commands.jobs.below("")
    with trio.fail_after(10):
        await job.over.wait()
    assert job.result is not None
    assert job.result["state"] == "done"
    assert (await server.info("hub/beside/model"))["residency"]["disk"] == len(BESIDE)


async def test_the_next_server_knows_which_store_is_away(
    serving: Serving, beside: MemoryStore, ledger: Callable[[], Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.stores.circuit_breaker.FORGOTTEN_AFTER_S", 60.0)  # a server may start slowly
    async with serving(ledger=ledger()) as server:
        away(beside)
        with pytest.raises(StoreUnavailableError):
            await server.content("hub/beside/model")
        assert server.components.breakers.of("hub/beside/").open

    async with serving(ledger=ledger()) as server:
        assert server.components.breakers.of("hub/beside/").open
        assert "503" in str(server.components.breakers.of("hub/beside/").problem)
        assert not server.components.breakers.of("main/").failing
        assert await server.content("main/model") == MODEL


@asynccontextmanager
async def after_an_upgrade(
    serving: Serving,
    ledger: Callable[[], Ledger],
    path: str,
    before: Mapping[str, MemoryStore],
    after: Mapping[str, MemoryStore],
) -> AsyncIterator[tuple[Server, int]]:
    """A server with other paths than the one before it, in which a program had opened a file, and its handle."""
    first = next(iter(before.values()))
    async with serving(beside=before, ledger=ledger(), prefetch="off") as server:
        gate = first.block(method="read", offset=0)
        handle = await server.open(path)
        gate.set()
        first.heal()
    async with serving(beside=after, ledger=ledger(), prefetch="off") as server:
        server.handles.add(handle)
        yield server, handle
        server.release(handle)
        await until(lambda: server.users() == 0)


async def test_a_file_of_a_store_that_an_upgrade_removed_gives_estale_for_what_is_missing(
    serving: Serving, beside: MemoryStore, ledger: Callable[[], Ledger]
) -> None:
    async with after_an_upgrade(serving, ledger, "one/model", {"one": beside}, {}) as (server, handle):
        with pytest.raises(ObjectChangedError):
            await server.read(handle)
        assert await server.content("main/model") == MODEL


async def test_a_file_is_read_on_when_an_upgrade_removed_another_path_of_its_store(
    serving: Serving, beside: MemoryStore, ledger: Callable[[], Ledger]
) -> None:
    both = {"a": beside, "b": beside}
    async with after_an_upgrade(serving, ledger, "b/model", both, {"b": beside}) as (server, handle):
        assert await server.read(handle) == BESIDE
        assert await server.content("b/model") == BESIDE
        assert len(await server.disk.residencies.all()) == 1


async def test_a_file_is_read_on_when_an_upgrade_added_another_path_of_its_store(
    serving: Serving, beside: MemoryStore, ledger: Callable[[], Ledger]
) -> None:
    both = {"a": beside, "b": beside}
    async with after_an_upgrade(serving, ledger, "b/model", {"b": beside}, both) as (server, handle):
        assert await server.content("a/model") == BESIDE
        assert await server.read(handle) == BESIDE
        assert len(await server.disk.residencies.all()) == 1


async def test_pins_of_a_store_come_back_while_another_is_away(
    serving: Serving, store: MemoryStore, beside: MemoryStore
) -> None:
    async with serving() as server:
        assert (await server.outcome("pin", "main/model"))[0] == "done"
        assert (await server.outcome("pin", "hub/beside/model"))[0] == "done"
        for key in ("main/model", "hub/beside/model"):
            generation = (await server.find(key)).inode.generation
            assert generation is not None
            token = server.disk.blobs.token(generation)
            server.disk.index.remove_chunks(token, range(len(BESIDE)))
    away(store)
    away(beside)

    async with serving() as server:
        await until(lambda: server.components.breakers.of("main/").failing)
        store.heal()
        await until(lambda: store.reads("model")[2:] != [])  # though the other store stays away
