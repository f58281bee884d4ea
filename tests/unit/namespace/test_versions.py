"""A server over a store with versions: what its file system shows, and to whom."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.served import Server, served
from tests.support.stores import MemoryStore, as_store
from tests.support.versions import in_memory, move, publish, remove
from tests.unit.namespace.processes import Processes
from trimsfs.errors import NoSuchEntryError, StoreUnavailableError
from trimsfs.filesystem import names
from trimsfs.formats.version_records import alias_key
from trimsfs.stores.base import Page
from trimsfs.stores.layouts.versioned import VersionedStore
from trimsfs.types import Symlink

CHUNK = 1 << 16


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A model with one version and an alias that leads to it. Each new process makes the server ask."""
    monkeypatch.setattr(names, "ALIAS_AGE_S", 0.0)
    store = MemoryStore()
    publish(in_memory(store), "m", "v1", {"a": b"1", "sub/b": b"1"})
    move(in_memory(store), "m", "prod", "v1")
    return store


@pytest.fixture
async def server(store: MemoryStore, tmp_path: Path, processes: Processes) -> AsyncIterator[Server]:
    for pid in (7, 8, 9):
        processes.start(pid)
    async with served(store, tmp_path, chunk_size=CHUNK) as server:
        yield server


async def seen_by(server: Server, process: int) -> str:
    """The target of the alias for a process."""
    number = await server.number("m/prod")
    return (await server.filesystem.names.follow(number, thread=process)).decode()


async def load(server: Server, process: int, path: str) -> bytes:
    """What a process reads through the alias."""
    return await server.content(f"m/{await seen_by(server, process)}/{path}")


async def test_a_flip_shows_in_a_new_process_though_the_listing_is_older_than_the_version(
    server: Server, store: MemoryStore
) -> None:
    assert await server.listing("m") == ["prod", "v1"]
    assert await load(server, 7, "sub/b") == b"1"
    with pytest.raises(NoSuchEntryError):
        await server.find("m/v2")
    publish(in_memory(store), "m", "v2", {"a": b"2", "sub/b": b"2"})
    move(in_memory(store), "m", "prod", "v2")
    assert await load(server, 8, "sub/b") == b"2"
    assert await load(server, 7, "a") == b"1"
    move(in_memory(store), "m", "prod", "v1")
    assert await load(server, 9, "a") == b"1"
    assert await load(server, 8, "a") == b"2"


async def test_processes_that_come_at_once_share_an_answer(
    server: Server, store: MemoryStore, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "ALIAS_AGE_S", 60.0)
    await server.number("m/prod")
    store.requests.clear()
    async with trio.open_nursery() as nursery:
        for pid in range(100, 200):
            processes.start(pid)
            nursery.start_soon(seen_by, server, pid)
    assert store.requests == []


async def test_a_removed_version_is_not_found_and_what_is_open_goes_on(server: Server, store: MemoryStore) -> None:
    handle = await server.open("m/v1/a")
    inside = await server.number("m/v1/sub")
    remove(in_memory(store), "m", "v1")
    server.components.namespace.expire("m/")
    with pytest.raises(NoSuchEntryError):
        await server.find("m/v1")
    assert await server.read(handle) == b"1"
    assert (await server.filesystem.names.lookup(inside, b"b")).size == 1


async def test_an_alias_that_is_gone_leads_nowhere(server: Server, store: MemoryStore) -> None:
    assert await seen_by(server, 7) == "v1"
    number = await server.number("m/prod")
    store.delete(alias_key("m", "prod"))
    with pytest.raises(NoSuchEntryError):
        await server.filesystem.names.follow(number, thread=8)
    assert await server.filesystem.names.follow(number, thread=7) == b"v1"


async def test_while_the_store_is_away_the_last_target_counts(server: Server, store: MemoryStore) -> None:
    assert await load(server, 7, "a") == b"1"
    store.fail(StoreUnavailableError("down"), times=1000)
    with trio.fail_after(5):
        assert await load(server, 8, "a") == b"1"


async def test_a_link_that_is_no_alias_is_not_asked_about(store: MemoryStore, tmp_path: Path) -> None:
    store.link("plain/link", "../m/v1/a")
    async with served(store, tmp_path, chunk_size=CHUNK) as server:
        number = await server.number("plain/link")
        store.requests.clear()
        assert await server.filesystem.names.follow(number, thread=7) == b"../m/v1/a"
        assert store.requests == []


async def test_an_alias_may_move_while_its_model_is_listed(store: MemoryStore, tmp_path: Path) -> None:
    publish(in_memory(store), "m", "v2", {"a": b"2"})
    versioned = VersionedStore(as_store(store))
    gate = store.block(method="read", key=alias_key("m", "prod"), times=1)
    pages = list[Page]()

    async def list_model() -> None:
        pages.append(await versioned.list_page("m/"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(list_model)
        await wait_all_tasks_blocked()
        move(in_memory(store), "m", "prod", "v2")
        gate.set()
    assert pages[0].symlinks == (Symlink(key="m/prod", target="v2"),)


async def test_an_alias_wins_over_an_object_of_its_name(store: MemoryStore) -> None:
    store.put("m/prod", b"v1")
    page = await VersionedStore(as_store(store)).list_page("m/")
    assert ([link.key for link in page.symlinks], [each.key for each in page.objects]) == (["m/prod"], [])
