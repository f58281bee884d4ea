from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.support.parts import content_of, until
from tests.support.served import Server, Serving, served
from tests.support.stores import MemoryStore
from trimsfs.errors import NoSuchEntryError, ObjectChangedError, StoreUnavailableError
from trimsfs.namespace.inodes import ROOT_INODE
from trimsfs.stores.base import Sink
from trimsfs.types import Generation

CHUNKS = 6


def down() -> StoreUnavailableError:
    """What a store says that cannot be reached."""
    return StoreUnavailableError("the store is down")


@pytest.fixture
def old(chunk_size: int) -> bytes:
    """The content of ``dir/model`` at first."""
    return content_of("old", CHUNKS * chunk_size - 123)


@pytest.fixture
def new(chunk_size: int) -> bytes:
    """What ``dir/model`` is replaced by."""
    return content_of("new", CHUNKS * chunk_size - 123)


@pytest.fixture
def store(old: bytes) -> MemoryStore:
    return MemoryStore({"dir/model": old, "dir/symbol.json": b"{}", "empty": b"", "readme": b"read me"})


@pytest.fixture
async def watchful(serving: Serving) -> AsyncIterator[Server]:
    """A server that asks the store at every lookup."""
    async with serving(metadata_ttl=0) as server:
        yield server


# Names


async def test_inodes_are_given_up_when_the_kernel_forgets_them(server: Server) -> None:
    for path in ("dir/model", "dir/model", "readme", ".trims/readme/info", "dir/.trims/.trims/evict"):
        await server.find(path)
    assert server.namespace.statistics().inodes > 6
    server.forget()
    assert server.namespace.statistics().inodes == 1


# Directories


async def test_directory_lists_all_but_the_control_directory(server: Server) -> None:
    assert await server.listing("") == ["dir", "empty", "readme"]
    assert await server.listing("dir") == ["model", "symbol.json"]
    assert (await server.find(".trims")).directory


async def test_listing_goes_on_from_any_position(server: Server) -> None:
    handle = await server.filesystem.names.open_directory(ROOT_INODE)
    whole = [(name, position) for name, _, position in await server.filesystem.names.list_directory(handle, 0)]
    assert whole == [(b"dir", 1), (b"empty", 2), (b"readme", 3)]
    for start in range(4):
        rest = [(name, position) for name, _, position in await server.filesystem.names.list_directory(handle, start)]
        assert rest == whole[start:]
    server.filesystem.files.release(handle)


async def test_listing_tells_the_attributes_of_a_lookup(server: Server) -> None:
    handle = await server.filesystem.names.open_directory(await server.number("dir"))
    for name, listed, _ in await server.filesystem.names.list_directory(handle, 0):
        found = await server.find(f"dir/{name.decode()}")
        assert (listed.inode, listed.size, listed.directory) == (found.inode, found.size, found.directory)
    server.filesystem.files.release(handle)


async def test_open_listing_does_not_change(watchful: Server, store: MemoryStore) -> None:
    handle = await watchful.filesystem.names.open_directory(ROOT_INODE)
    store.delete("empty")
    store.put("another", b"")
    assert [name for name, _, _ in await watchful.filesystem.names.list_directory(handle, 1)] == [b"empty", b"readme"]
    watchful.filesystem.files.release(handle)
    assert await watchful.listing("") == ["another", "dir", "readme"]


async def test_listing_keeps_only_the_inodes_that_the_kernel_was_told(server: Server) -> None:
    handle = await server.filesystem.names.open_directory(ROOT_INODE)
    numbers = []
    for name, attributes, _ in await server.filesystem.names.list_directory(handle, 0):
        if name == b"readme":
            server.filesystem.names.inodes.discard(attributes.inode)
            break
        server.filesystem.names.count_lookup(attributes)
        numbers.append(attributes.inode.number)
    server.filesystem.files.release(handle)
    assert server.namespace.statistics().inodes == 1 + len(numbers) == 3
    for number in numbers:
        server.filesystem.names.inodes.forget(number, 1)
    assert server.namespace.statistics().inodes == 1


# Reading


async def test_reads_that_go_on_where_another_program_stopped_are_in_order(
    serving: Serving, store: MemoryStore, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reads each page for one of the programs that map a file."""
    monkeypatch.setattr("trimsfs.fetch.bypass.LEAST_GAP", 1)
    content = content_of("large", 64 * chunk_size)
    store.put("large", content)
    size = chunk_size // 4
    async with serving(cold_open="stream") as server:
        handles = [await server.open("large") for _ in range(8)]
        for number, start in enumerate(range(0, len(content), size)):
            assert await server.read(handles[number % 8], start, size) == content[start : start + size]
        assert len(store.reads("large")) == len(set(store.reads("large")))
        patterns = [file.pattern for file in server.filesystem.handles.files.values()]
        assert [pattern is not None and pattern.random for pattern in patterns] == [False] * 8


async def test_reads_and_their_bytes_are_counted(server: Server, old: bytes) -> None:
    handle = await server.open("dir/model")
    await server.read(handle, 0, 1000)
    await server.read(handle, len(old) - 10, 4096)
    statistics = server.filesystem.statistics()
    assert (statistics.open_handles, statistics.reads, statistics.read_bytes) == (1, 2, 1010)


async def test_space_is_what_the_cache_may_hold(serving: Serving, old: bytes, chunk_size: int) -> None:
    budget = 10 * chunk_size
    async with serving(cache_size=budget) as server:
        assert server.filesystem.space() == (budget, budget)
        assert await server.outcome("warm-disk", "dir/model") == ("done", None)
        assert server.filesystem.space() == (budget, budget - len(old))


# Handles


async def test_each_open_is_released_on_its_own(server: Server, old: bytes) -> None:
    first, second = await server.open("dir/model"), await server.open("dir/model")
    assert server.filesystem.statistics().open_handles == 2
    server.release(first)
    assert await server.read(second, 0, 100) == old[:100]
    assert server.disk.statistics().open_blobs == 1
    server.release(second)
    await until(lambda: server.users() == 0)
    assert server.disk.statistics().open_blobs == 0
    assert server.filesystem.statistics().open_handles == 0


async def test_file_stays_readable_after_its_name_was_forgotten(server: Server, old: bytes) -> None:
    handle = await server.open("dir/model")
    server.forget()
    assert await server.read(handle, 5, 100) == old[5:105]


async def test_release_ends_the_fetching_of_what_nobody_reads(
    server: Server, store: MemoryStore, chunk_size: int
) -> None:
    store.put("large", content_of("large", 100 * chunk_size))
    gate = store.block(method="read")
    handle = await server.open("large")
    with trio.move_on_after(0.05):
        await server.read(handle, 0, 100)
    started = store.count("read")
    server.release(handle)
    gate.set()
    await until(lambda: server.users() == 0)
    assert store.count("read") == started < 100


# Replacement: a handle reads one generation


async def test_replaced_while_it_is_read_gives_what_is_on_disk_and_else_an_error(
    watchful: Server, store: MemoryStore, old: bytes, new: bytes, chunk_size: int
) -> None:
    for chunk in range(2, CHUNKS):
        store.block(method="read", offset=chunk * chunk_size)
    handle = await watchful.open("dir/model")
    assert await watchful.read(handle, 0, 2 * chunk_size) == old[: 2 * chunk_size]
    store.put("dir/model", new)
    store.heal()

    outcomes = set()
    for offset in range(0, len(old), chunk_size // 2):
        try:
            piece = await watchful.read(handle, offset, chunk_size // 2)
        except ObjectChangedError:
            outcomes.add("error")
        else:
            assert piece == old[offset : offset + chunk_size // 2]
            outcomes.add("old")
    assert outcomes == {"old", "error"}
    assert await watchful.read(handle, 0, 2 * chunk_size) == old[: 2 * chunk_size]


async def test_replaced_inode_cannot_be_opened(server: Server, store: MemoryStore, new: bytes) -> None:
    number = await server.number("dir/model")
    handle = await server.open_inode(number)
    store.put("dir/model", new)
    with pytest.raises(ObjectChangedError):
        await server.read(handle)
    server.release(handle)

    with pytest.raises(ObjectChangedError):
        await server.open_inode(number)
    await until(lambda: server.users() == 0)
    assert server.filesystem.statistics().open_handles == 0
    assert await server.content("dir/model") == new


async def test_content_that_comes_back_is_opened_again_and_invalidated_when_it_goes_again(
    watchful: Server, store: MemoryStore, old: bytes, new: bytes
) -> None:
    number = await watchful.number("dir/model")
    for round_ in range(1, 3):
        assert await watchful.number("dir/model") == number
        handle = await watchful.open_inode(number)
        store.put("dir/model", new)
        with pytest.raises(ObjectChangedError):
            await watchful.read(handle)
        assert len(watchful.invalidated) == round_
        store.put("dir/model", old)
    assert await watchful.number("dir/model") == number
    assert await watchful.content("dir/model") == old


async def test_version_is_read_to_its_end_after_it_was_deleted(
    watchful: Server, store: MemoryStore, old: bytes, chunk_size: int
) -> None:
    store.put("dir/model", old, version_id="v1")
    for chunk in range(1, CHUNKS):
        store.block(method="read", offset=chunk * chunk_size)
    handle = await watchful.open("dir/model")
    await watchful.read(handle, 0, 100)
    store.delete("dir/model")
    store.heal()
    assert await watchful.read(handle) == old
    with pytest.raises(NoSuchEntryError):
        await watchful.find("dir/model")


class _PruningStore(MemoryStore):
    """Has forgotten some versions, as a bucket does by a rule of its life cycle."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.pruned: set[str | None] = set()

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        if generation.version_id in self.pruned:
            raise ObjectChangedError(f"{generation.key}: no such version")
        return await super().read(generation, offset, length, sink)


async def test_content_that_is_still_there_is_read_after_its_first_version_is_gone(
    tmp_path: Path, chunk_size: int, old: bytes
) -> None:
    store = _PruningStore({})
    store.put("model", old, version_id="v1")
    for chunk in range(1, CHUNKS):
        store.fail(down(), times=float("inf"), method="read", offset=chunk * chunk_size)
    async with served(store, tmp_path / "cache", chunk_size=chunk_size, metadata_ttl=0) as server:
        handle = await server.open("model")
        assert await server.read(handle, 0, 100) == old[:100]
        store.put("model", old, version_id="v2")
        store.pruned.add("v1")
        server.release(handle)
        await server.idle()

        assert await server.content("model") == old


@pytest.mark.parametrize("becomes_a_directory", [False, True])
async def test_deleted_while_it_is_read(server: Server, store: MemoryStore, becomes_a_directory: bool) -> None:
    parent = await server.number("dir")
    handle = await server.open("dir/model")
    store.delete("dir/model")
    if becomes_a_directory:
        store.put("dir/model/first", b"new")
    with pytest.raises(ObjectChangedError):
        await server.read(handle)
    assert server.invalidated == [(parent, b"model")]
    if becomes_a_directory:
        assert await server.content("dir/model/first") == b"new"
    else:
        with pytest.raises(NoSuchEntryError):
            await server.find("dir/model")


async def test_parent_that_the_kernel_has_forgotten_is_no_longer_known_after_a_replacement(
    server: Server, store: MemoryStore, new: bytes
) -> None:
    handle = await server.open("dir/model")
    server.forget()
    store.put("dir/model", new)
    with pytest.raises(ObjectChangedError):
        await server.read(handle)
    assert server.namespace.statistics().inodes == 1
