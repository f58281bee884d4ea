"""Opens and lookups that are answered at once: without a wait, and with all that an open is otherwise."""

import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.parts import content_of
from tests.support.served import OWNER, FakeBacking, Server, Serving, served
from tests.support.stores import MemoryStore
from trimsfs.errors import BlobDamagedError
from trimsfs.filesystem import files
from trimsfs.filesystem.handles import BACKING_SHIFT
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.namespace.inodes import ROOT_INODE
from trimsfs.tiers.blob import Blob

NAMES = ("a", "b", "c")


@pytest.fixture
def store(chunk_size: int) -> MemoryStore:
    return MemoryStore({f"d/{name}": content_of(name, 3 * chunk_size - 100) for name in NAMES})


@pytest.fixture
def serving(store: MemoryStore, backing: FakeBacking, tmp_path: Path, chunk_size: int) -> Serving:
    """Starts a server that passes opens through; always with the same cache."""
    return partial(served, store, tmp_path / "cache", chunk_size=chunk_size, backing=backing)


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    """A server of which all files are resident."""
    async with serving() as server:
        await warm(server)
        yield server


async def warm(server: Server) -> None:
    for name in NAMES:
        assert await server.outcome("warm-host", f"d/{name}") == ("done", None)


def blob_of(server: Server, name: str) -> Blob:
    blob = server.disk.blobs.known(server.store.generation(f"d/{name}").token(server.store.identity))
    assert blob is not None
    return blob


def opened(server: Server, number: int, *, request: int = 1) -> int:
    """The handle of an open that is answered at once."""
    handle = server.open_resident(number, request=request)
    assert handle is not None
    return handle


# Opens


async def test_a_resident_file_is_opened_and_closed_as_by_any_open(server: Server) -> None:
    number, blob = await server.number("d/a"), blob_of(server, "a")
    users = blob.users
    handles = [opened(server, number) for _ in range(3)]
    assert len(set(handles)) == 3
    assert (blob.users, blob.handles, blob.passed) == (users + 3, 3, 3)
    assert await server.read(handles[0]) == content_of("a", blob.generation.size)
    statistics = server.filesystem.statistics()
    assert (statistics.open_handles, statistics.passthrough_handles, statistics.passthrough_opens) == (3, 3, 3)
    assert await server.outcome("evict", "d/a") == ("failed", "InUseError")
    for handle in handles:
        server.release(handle)
    assert (blob.users, blob.handles, blob.passed) == (users, 0, 0)
    assert await server.outcome("evict", "d/a") == ("done", None)


async def test_what_an_open_waits_for_is_left_to_it_and_nothing_is_changed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {name: await server.number(f"d/{name}") for name in NAMES}
    server.release(opened(server, numbers["a"]))
    assert await server.outcome("evict", "d/a") == ("done", None)
    blob_of(server, "b").health.quarantine = BlobDamagedError("damaged")
    monkeypatch.setattr(server.host, "holds", lambda blob: blob is not blob_of(server, "c"))
    before = server.filesystem.statistics(), server.users()
    for number in (*numbers.values(), 12345, ROOT_INODE):
        assert server.filesystem.files.open_resident(number, 1) is None
    assert (server.filesystem.statistics(), server.users()) == before
    blob_of(server, "b").health.quarantine = None


@pytest.mark.parametrize("closed", [False, True])
async def test_a_file_that_somebody_has_truncated_is_not_opened_at_once(server: Server, *, closed: bool) -> None:
    number, blob = await server.number("d/a"), blob_of(server, "a")
    server.release(opened(server, number))
    if closed:
        blob.close_file()
    os.truncate(blob._path, 10)
    assert server.filesystem.files.open_resident(number, 1) is None
    assert await server.content("d/a") == content_of("a", blob.generation.size)


async def test_an_open_that_is_answered_at_once_uses_what_came_ahead(server: Server) -> None:
    prefetcher = server.components.prefetcher
    prefetcher._account._came(blob_of(server, "a").token, 10)
    before = prefetcher.statistics().used_files
    server.release(opened(server, await server.number("d/a")))
    assert prefetcher.statistics().used_files == before + 1


async def test_the_file_used_longest_ago_is_evicted_first_also_if_all_were_opened_at_once(server: Server) -> None:
    order = ["b", "c", "a"]
    for name in order:
        server.release(opened(server, await server.number(f"d/{name}")))
    known = [blob.generation.key for blob in server.disk._state.blobs.values()]
    assert known == [f"d/{name}" for name in order]


async def test_opens_that_are_answered_at_once_complete_in_any_order(server: Server) -> None:
    opens, handles = server.filesystem.files, list[int]()
    for name in ("a", "b"):
        handle = opens.open_resident(await server.number(f"d/{name}"), 1)
        assert handle is not None
        handles.append(handle)
    for handle in reversed(handles):
        opens.used(handle, 1, lambda: OWNER)
        server.handles.add(handle)
    assert [opens.path(handle) for handle in handles] == ["d/a", "d/b"]


# Spare handles


async def test_spare_handles_are_few_and_those_of_evicted_files_lead_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_SPARE", 2)
    numbers = [await server.number(f"d/{name}") for name in NAMES]
    for number in numbers:
        server.release(opened(server, number))
    assert len(server.filesystem.handles._slots) == 2
    assert await server.outcome("evict", "d/c") == ("done", None)
    assert server.filesystem.files.open_resident(numbers[2], 1) is None
    assert len(server.filesystem.handles._slots) == 1


async def test_a_file_that_is_registered_anew_is_opened_by_its_new_id(server: Server, backing: FakeBacking) -> None:
    """The kernel fails an open by an id that is closed."""
    number, blob = await server.number("d/a"), blob_of(server, "a")
    server.release(opened(server, number))
    before = blob.backing_id
    server.passthrough.unregister(blob)
    assert server.filesystem.files.open_resident(number, 1) is None
    assert server.filesystem.handles._slots == {}
    server.release(await server.open("d/a"))
    server.passthrough.unregister(blob)
    assert await server.passthrough.register(blob)
    handle = opened(server, number)
    assert handle >> BACKING_SHIFT == blob.backing_id != before
    server.release(handle)
    assert len(server.filesystem.handles._slots) == 1


async def test_a_handle_that_the_kernel_did_not_take_leaves_nothing_in_use(server: Server) -> None:
    number, users = await server.number("d/a"), server.users()
    handle = server.filesystem.files.open_resident(number, 1)
    assert handle is not None
    server.filesystem.files.release(handle)
    assert server.users() == users
    assert server.filesystem.handles._slots == {}
    assert server.filesystem.files._resident == {}
    server.release(opened(server, number))


# Takeover


async def test_the_next_server_has_what_was_opened_at_once_and_no_spare_handle(
    serving: Serving, ledger: Callable[[], Ledger]
) -> None:
    async with serving(ledger=ledger()) as server:
        await warm(server)
        numbers = {name: await server.number(f"d/{name}") for name in NAMES}
        kept = opened(server, numbers["a"], request=7)
        asked_again = server.filesystem.files.open_resident(numbers["b"], 9)  # it dies before it knows more
        server.release(opened(server, numbers["c"], request=11))
    async with serving(ledger=ledger()) as server:
        assert server.filesystem.handles.files.keys() == {kept, asked_again}
        server.filesystem.resent(9)
        assert server.filesystem.handles.files.keys() == {kept}
        assert await server.outcome("evict", "d/a") == ("failed", "InUseError")
        assert await server.outcome("evict", "d/b") == ("done", None)
        server.filesystem.handles.all_resent()
        server.filesystem.files.release(kept)
        assert ledger().inherited(RecordKind.HANDLE) == []


# Lookups


async def test_a_known_name_is_told_at_once_and_no_other_is(serving: Serving) -> None:
    async with serving() as server:
        names, directory = server.filesystem.names, await server.number("d")
        assert names.lookup_known(directory, b"a", thread=1) is None
        found = await names.lookup(directory, b"a")
        told = names.lookup_known(directory, b"a", thread=1)
        assert told is not None
        assert (told.inode, told.size, told.ownership) == (found.inode, found.size, found.ownership)
        assert 0 < told.entry_ttl_s <= found.entry_ttl_s
        for parent, name in ((directory, b"absent"), (directory, b".trims"), (12345, b"a"), (directory, b"x" * 300)):
            assert names.lookup_known(parent, name, thread=1) is None
    async with serving(metadata_ttl=0) as server:
        directory = await server.number("d")
        await server.number("d/a")
        assert server.filesystem.names.lookup_known(directory, b"a", thread=1) is None


async def test_a_reopen_is_told_what_the_store_has(server: Server) -> None:
    names, directory = server.filesystem.names, await server.number("d")
    server.filesystem._opener.reopens.request(5, "d/a")
    assert names.lookup_known(directory, b"a", thread=5) is None
    assert names.lookup_known(directory, b"a", thread=6) is not None


async def test_a_reopen_that_is_answered_at_once_is_the_last(server: Server) -> None:
    reopens = server.filesystem._opener.reopens
    number = await server.number("d/a")
    reopens.request(5, "d/a")
    handle = server.open_resident(number, thread=5)
    assert handle is not None
    assert not reopens.expected(5, "d/a")
    server.release(handle)
