"""Small files beside one that is opened come before they are asked for."""

from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import content_of, until
from tests.support.served import OWNER, STRANGER, FakeBacking, Server, Serving
from tests.support.stores import MemoryStore
from trimsfs.errors import StoreUnavailableError
from trimsfs.options import AccessRule, Eviction
from trimsfs.prefetch.account import PrefetchStatistics
from trimsfs.prefetch.directory_readahead import SMALL
from trimsfs.prefetch.siblings import DESCRIPTORS_PER_FILE

FILES = 40
LEAST_DESCRIPTORS = 128


@pytest.fixture
def contents() -> dict[str, bytes]:
    return {f"dir/{number:02}": content_of(str(number), 100 + number) for number in range(FILES)}


@pytest.fixture
def store(contents: dict[str, bytes]) -> MemoryStore:
    return MemoryStore({**contents, "dir/large": bytes(SMALL + 1), "dir/empty": b"", "other/file": b"other"})


@pytest.fixture
def serving(serving: Serving, backing: FakeBacking) -> Serving:
    """Starts a server that passes opens through, once their files are here."""
    return partial(serving, backing=backing, cold_open="wait")


async def quiet(server: Server) -> None:
    """Wait until nothing is fetched any more."""
    await wait_all_tasks_blocked(0.02)
    await until(lambda: server.fetcher.statistics().in_flight == 0)


async def listed(server: Server, path: str) -> None:
    """A program lists a directory."""
    server.filesystem.files.release(await server.filesystem.open_directory(await server.number(path), lambda: OWNER))


def counted(server: Server) -> PrefetchStatistics:
    return server.components.prefetcher.statistics()


def fetched(store: MemoryStore) -> set[str]:
    return set(store.reads_by_key())


async def test_few_descriptors_are_left_to_programs(
    serving: Serving, store: MemoryStore, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the least limit of a mount, while the store gives no answer to any prefetch."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (LEAST_DESCRIPTORS, LEAST_DESCRIPTORS))
    async with serving() as server:
        await server.content("other/file")
        for number in range(1, FILES):
            store.block(key=f"dir/{number:02}")
        await server.content("dir/00")
        await wait_all_tasks_blocked(0.02)
        assert 0 < store.under_way <= LEAST_DESCRIPTORS // DESCRIPTORS_PER_FILE
        store.heal()
        assert await server.content("dir/01") == contents["dir/01"]


async def test_the_first_brings_those_that_follow_and_no_large_one(
    server: Server, store: MemoryStore, contents: dict[str, bytes]
) -> None:
    await server.content("dir/05")
    await until(lambda: len(fetched(store)) >= 33)
    await quiet(server)
    assert fetched(store) <= set(contents)
    assert {f"dir/{number:02}" for number in range(5, FILES - 2)} <= fetched(store)
    for number in range(5, FILES - 2):
        handle = await server.open(f"dir/{number:02}")
        assert await server.read(handle) == contents[f"dir/{number:02}"]
        server.release(handle)
    assert server.filesystem.statistics().cached_opens == 0
    assert all(len(offsets) == 1 for offsets in store.reads_by_key().values())


async def test_every_file_of_a_directory_is_fetched_once(
    server: Server, store: MemoryStore, contents: dict[str, bytes]
) -> None:
    for path, content in contents.items():
        assert await server.content(path) == content
    await quiet(server)
    reads = store.reads_by_key()
    assert set(reads) == set(contents)
    assert all(len(offsets) == 1 for offsets in reads.values())


async def test_what_was_evicted_comes_ahead_again(
    server: Server, store: MemoryStore, contents: dict[str, bytes]
) -> None:
    for path in contents:
        await server.content(path)
    await quiet(server)
    for path in contents:
        await server.disk.residencies.evict(store.generation(path))
    store.requests.clear()
    await server.content("dir/00")
    await until(lambda: len(fetched(store)) >= 33)
    await quiet(server)


async def test_a_listing_brings_the_first_small_files(server: Server, store: MemoryStore) -> None:
    await listed(server, "dir")
    await until(lambda: len(fetched(store)) >= 32)
    await quiet(server)
    assert fetched(store) == {f"dir/{number:02}" for number in range(32)}


async def test_listings_that_no_open_follows_bring_nothing_any_more(serving: Serving) -> None:
    store = MemoryStore({f"{directory}/{number}": b"x" for directory in range(8) for number in range(3)})
    async with serving(store=store) as server:
        for directory in range(6):
            await listed(server, str(directory))
        await until(lambda: len(fetched(store)) >= 4 * 3)
        await quiet(server)
        assert len(fetched(store)) == 4 * 3
        await server.content("5/0")
        await quiet(server)
        await listed(server, "7")
        await until(lambda: {"5/0", "5/1", "5/2", "7/0", "7/1", "7/2"} <= fetched(store))


async def test_what_the_caller_may_not_read_does_not_come(serving: Serving, store: MemoryStore) -> None:
    rules = (AccessRule(path="dir/1*", uid=5, mode=0o400), AccessRule(path="dir/2*", uid=5, mode=0o400))
    async with serving(access=rules) as server:
        await server.content("dir/00", STRANGER)
        await until(lambda: len(fetched(store)) >= 13)
        await quiet(server)
    assert fetched(store) == {f"dir/{number:02}" for number in (*range(10), *range(30, 33))}


@pytest.mark.parametrize("options", [{"prefetch": "off"}, {"eviction": Eviction(disk="eager")}])
async def test_what_is_switched_off_brings_nothing(
    serving: Serving, store: MemoryStore, options: dict[str, str]
) -> None:
    async with serving(**options) as server:
        await server.content("dir/05")
        await listed(server, "dir")
        await quiet(server)
    assert fetched(store) == {"dir/05"}


async def test_what_came_ahead_is_counted(server: Server, store: MemoryStore) -> None:
    await server.content("dir/00")
    await until(lambda: counted(server).ahead_files == 32)
    assert counted(server).ahead_bytes == sum(range(101, 133))
    await server.content("dir/05")
    assert (counted(server).used_files, counted(server).used_bytes) == (1, 105)
    await quiet(server)
    await server.disk.residencies.evict(store.generation("dir/09"))
    assert (counted(server).wasted_files, counted(server).wasted_bytes) == (1, 109)


async def test_what_is_opened_while_it_comes_did_not_come_ahead(server: Server, store: MemoryStore) -> None:
    gate = store.block(method="read", key="dir/05")
    await server.content("dir/00")
    await until(lambda: counted(server).ahead_files == 31)
    assert counted(server).coming_files == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.content, "dir/05")
        await until(lambda: counted(server).coming_files == 0)
        gate.set()
    await quiet(server)
    assert counted(server).ahead_files == 31


async def test_what_fails_unasked_is_nobodys_error(
    server: Server, store: MemoryStore, contents: dict[str, bytes]
) -> None:
    store.fail(StoreUnavailableError("down"), times=float("inf"), key="dir/07")
    await server.content("dir/00")
    await until(lambda: len(fetched(store)) >= 30)
    await quiet(server)
    await until(lambda: server.users() == 0)
    store.heal()
    assert await server.content("dir/07") == contents["dir/07"]


async def test_without_room_nothing_is_fetched_unasked(serving: Serving, store: MemoryStore) -> None:
    async with serving(cache_size=0) as server:
        for number in range(3):
            await server.content(f"dir/{number:02}")
        await quiet(server)
        assert len(fetched(store)) < 3 + 16  # before it was known that there is none
        await until(lambda: server.users() == 0)


async def test_a_reader_does_not_wait_for_what_is_fetched_unasked(
    server: Server, store: MemoryStore, contents: dict[str, bytes]
) -> None:
    gate = store.block(key="dir/03")
    await server.content("dir/00")
    with trio.fail_after(2):
        assert await server.content("dir/30") == contents["dir/30"]
    gate.set()
