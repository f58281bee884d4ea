"""Small files beside one that is opened come before they are asked for."""

from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import content_of, until
from tests.support.served import FakeBacking, Server, Serving, served
from tests.support.stores import MemoryStore
from trimsfs.errors import StoreUnavailableError
from trimsfs.prefetch.directory_readahead import SMALL

FILES = 40


@pytest.fixture
def contents() -> dict[str, bytes]:
    return {f"dir/{number:02}": content_of(str(number), 100 + number) for number in range(FILES)}


@pytest.fixture
def store(contents: dict[str, bytes]) -> MemoryStore:
    return MemoryStore({**contents, "dir/large": bytes(SMALL + 1), "dir/empty": b"", "other/file": b"other"})


@pytest.fixture
def serving(store: MemoryStore, tmp_path: Path, chunk_size: int) -> Serving:
    return partial(
        served,
        store,
        tmp_path / "cache",
        chunk_size=chunk_size,
        backing=FakeBacking(),
        cold_open="wait",
    )


async def quiet(server: Server) -> None:
    """Wait until nothing is fetched any more."""
    await wait_all_tasks_blocked(0.02)
    await until(lambda: server.fetcher.statistics().in_flight == 0)


def fetched(store: MemoryStore) -> set[str]:
    return set(store.reads_by_key())


async def test_one_file_alone_brings_no_other(server: Server, store: MemoryStore) -> None:
    await server.content("dir/05")
    await quiet(server)
    assert fetched(store) == {"dir/05"}


async def test_the_second_brings_those_that_follow_and_no_large_one(
    server: Server, store: MemoryStore, contents: dict[str, bytes]
) -> None:
    await server.content("dir/05")
    await server.content("dir/06")
    await until(lambda: len(fetched(store)) >= 34)
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


async def test_files_of_two_directories_tell_nothing(server: Server, store: MemoryStore) -> None:
    await server.content("dir/05")
    await server.content("other/file")
    await quiet(server)
    assert fetched(store) == {"dir/05", "other/file"}


async def test_what_fails_unasked_is_nobodys_error(
    server: Server, store: MemoryStore, contents: dict[str, bytes]
) -> None:
    await server.content("dir/00")
    store.fail(StoreUnavailableError("down"), times=float("inf"), key="dir/07")
    await server.content("dir/01")
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
    await server.content("dir/00")
    gate = store.block(key="dir/03")
    await server.content("dir/01")
    with trio.fail_after(2):
        assert await server.content("dir/30") == contents["dir/30"]
    gate.set()
