"""Commands by control file."""

import json
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.support.parts import blob_files, flip_byte, until
from tests.support.served import Server, Serving
from tests.support.stores import MemoryStore
from tests.unit.control.common import drop, in_memory, last_line, on_disk
from trimsfs.control.commands import FILES_AT_ONCE
from trimsfs.errors import StoreAccessError, StoreError, StoreUnavailableError
from trimsfs.tiers.host import page_cache
from trimsfs.tiers.host.page_cache import resident_bytes


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
async def test_warming_brings_a_file_to_disk_once(
    server: Server, store: MemoryStore, sizes: dict[str, int], command: str
) -> None:
    assert await server.outcome(command, "net/params") == ("done", None)
    assert await on_disk(server, "net/params") == sizes["net/params"]
    assert sum(store.fetched.values()) == sizes["net/params"]
    assert await server.outcome(command, "net/params") == ("done", None)
    assert sum(store.fetched.values()) == sizes["net/params"]
    assert await server.attribute("net/params", "pinned") == ("true" if command == "pin" else "false")


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
@pytest.mark.parametrize("directory", ["net", "net/deep", ""])
async def test_warming_a_directory_brings_all_below_it_to_disk(
    server: Server, sizes: dict[str, int], command: str, directory: str
) -> None:
    lines = await server.command(command, directory)
    below = {key for key in sizes if key.startswith(f"{directory}/") or not directory}
    total = sum(sizes[key] for key in below)
    assert lines[-1] == {
        "path": f"{directory}/" if directory else "",
        "state": "done",
        "done_bytes": total,
        "total_bytes": total,
        "total_files": len(below),
        "failed_files": 0,
        "left_out_files": 0,
        "absent_files": 0,
        "absent_bytes": 0,
        "unlocked_files": 0,
        "unlocked": None,
        "compared_copies": 0,
        "waiting": None,
    }
    for key, size in sizes.items():
        assert await on_disk(server, key) == (size if key in below else 0)


async def test_directory_may_hold_more_files_than_are_warmed_at_once(serving: Serving, store: MemoryStore) -> None:
    for number in range(3 * FILES_AT_ONCE):
        store.put(f"many/{number}", b"model %d" % number)
    async with serving() as server:
        with trio.fail_after(5):
            assert await server.outcome("warm-disk", "many") == ("done", None)
            assert [model["verified"] for model in (await server.info("many"))["models"]] == [True] * 3 * FILES_AT_ONCE
            assert await server.outcome("evict", "many") == ("done", None)


async def test_warming_the_host_reads_every_byte_into_its_memory(
    server: Server, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "trimsfs.fetch.processes.thread_copier.populate", lambda _descriptor, start, stop: ranges.append((start, stop))
    )
    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: 0)
    await server.command("warm-disk", "net/params")
    await in_memory(server, "net/params")
    ranges.clear()
    await server.command("warm-host", "net/params")
    ends = [0, *(stop for _, stop in ranges)]
    assert [start for start, _ in ranges] == ends[:-1]
    assert ends[-1] == sizes["net/params"]


async def test_warming_the_host_brings_back_what_the_kernel_had_dropped(
    server: Server, tmp_path: Path, sizes: dict[str, int]
) -> None:
    await server.command("warm-disk", "net/params")
    await in_memory(server, "net/params")
    (path,) = blob_files(tmp_path / "cache")
    with path.open("rb") as file:
        if resident_bytes(file.fileno()) is None:
            pytest.skip("this kernel does not tell what is in its page cache")
        drop(file.fileno())
        if resident_bytes(file.fileno()) != 0:
            pytest.skip("this file system keeps its files in memory")
    residency = json.loads(await server.attribute("net/params", "residency") or "")
    assert residency == {"disk": sizes["net/params"], "host": 0, "gpu": {}}
    await server.command("warm-host", "net/params")
    residency = json.loads(await server.attribute("net/params", "residency") or "")
    assert residency["host"] >= sizes["net/params"]


async def test_pin_outlives_the_server(serving: Serving) -> None:
    async with serving() as server:
        await server.command("pin", "net/params")
    async with serving() as server:
        assert await server.attribute("net/params", "pinned") == "true"
        assert await server.outcome("evict", "net/params") == ("failed", "InUseError")


async def test_what_is_unpinned_while_it_is_brought_back_stays_unpinned(
    serving: Serving, store: MemoryStore, tmp_path: Path
) -> None:
    async with serving() as server:
        assert await server.outcome("pin", "other/params") == ("done", None)
    (file,) = blob_files(tmp_path / "cache")
    flip_byte(file, 0)
    store.block(method="read")
    reads = store.count("read")
    async with serving() as server:
        await store.arrived(reads + 1)
        assert await server.outcome("unpin", "other/params") == ("done", None)
        store.heal()
        await until(lambda: server.users() == server.fetcher.statistics().in_flight == 0)
        here = await server.disk.residencies.of(store.generation("other/params"))
        assert here.disk_bytes == here.generation.size
        assert not here.pinned


@pytest.mark.parametrize(("pinned", "of"), [("net/params", "net/params"), ("net", "net"), ("net", "")])
async def test_unpinning_reaches_all_below_and_what_has_been_replaced_since(
    serving: Serving, store: MemoryStore, sizes: dict[str, int], pinned: str, of: str
) -> None:
    """Nothing else could: it would be on disk, and locked in memory, for ever."""
    async with serving(metadata_ttl=0) as server:
        await server.command("pin", pinned)
        store.put("net/params", b"other content")
        assert server.host.statistics().locked_bytes >= sizes["net/params"]
        assert {here.pinned for here in await server.disk.residencies.all()} == {True}
        assert await server.outcome("unpin", of) == ("done", None)
        assert server.host.statistics().locked_bytes == 0
        assert {here.pinned for here in await server.disk.residencies.all()} == {False}


async def test_a_pin_that_is_given_up_takes_no_other_with_it(server: Server, store: MemoryStore) -> None:
    file = await server.control_file("net/params", "pin")
    gate = store.block(method="read")
    first, second = await server.open(file), await server.open(file)
    await store.arrived(1)
    server.release(first)
    gate.set()
    assert (await last_line(server, second))["state"] == "done"
    assert await server.attribute("net/params", "pinned") == "true"


async def test_evicting_what_is_not_here_does_nothing(server: Server, store: MemoryStore) -> None:
    assert await server.outcome("evict", "net/params") == ("done", None)
    assert await server.outcome("evict", "empty") == ("done", None)
    assert store.count("read") == 0


async def test_evicting_a_directory_leaves_its_neighbours(server: Server, sizes: dict[str, int]) -> None:
    await server.command("warm-disk", "")
    assert await server.outcome("evict", "net") == ("done", None)
    for key, size in sizes.items():
        assert await on_disk(server, key) == (0 if key.startswith("net/") else size)


@pytest.mark.parametrize("error", [StoreAccessError("not allowed"), StoreUnavailableError("away")])
async def test_evicting_needs_no_store(
    serving: Serving, store: MemoryStore, sizes: dict[str, int], error: StoreError
) -> None:
    async with serving(metadata_ttl=0.0, stale_for=0.0) as server:
        await server.command("warm-disk", "")
        store.fail(error, times=float("inf"), method="list_page", key="net/deep/")
        *_, last = await server.command("warm-disk", "net")
        assert (last["state"], last["kind"], last["error"]) == ("failed", type(error).__name__, str(error))
        assert await server.outcome("evict", "net") == ("done", None)
        assert server.disk.statistics().used_bytes == sizes["other/params"]
        assert await server.outcome("evict", "") == ("done", None)
        assert server.disk.statistics().used_bytes == 0


async def test_eviction_waits_for_a_close_that_is_about_to_be_heard_of(server: Server) -> None:
    await server.command("warm-disk", "net/params")
    handle = await server.open("net/params")
    outcomes: list[object] = []

    async def evict() -> None:
        outcomes.append(await server.outcome("evict", "net/params"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(evict)
        await trio.sleep(0.05)
        assert outcomes == []
        server.release(handle)
    assert outcomes == [("done", None)]
    assert await on_disk(server, "net/params") == 0


async def test_what_cannot_be_evicted_does_not_keep_the_rest_of_a_directory(
    server: Server, sizes: dict[str, int]
) -> None:
    await server.command("warm-disk", "net")
    handle = await server.open("net/params")
    assert await server.outcome("evict", "net") == ("failed", "InUseError")
    assert await on_disk(server, "net/params") == sizes["net/params"]
    assert await on_disk(server, "net/deep/er/weights") == 0
    assert await on_disk(server, "net/symbol.json") == 0
    server.release(handle)


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
async def test_what_is_larger_than_the_cache_is_told_and_leaves_nothing_behind(
    serving: Serving, sizes: dict[str, int], command: str
) -> None:
    async with serving(cache_size=sizes["net/params"] - 1) as server:
        await server.command("warm-disk", "other/params")
        *_, last = await server.command(command, "net/params")
        assert (last["state"], last["kind"], last["failed"]) == ("failed", "CacheFullError", "net/params")
        told = f"net/params: no room in the cache: its {sizes['net/params'] >> 20} MiB are more than --cache-size, "
        assert last["error"].startswith(told)
        assert last["error"].endswith(" MiB: raise that")
        assert await on_disk(server, "other/params") == sizes["other/params"]
        assert await server.attribute("net/params", "pinned") == "false"
        await until(lambda: server.users() == 0)  # requests that were under way
        assert server.disk.statistics().used_bytes < sizes["net/params"]
        assert await server.outcome("evict", "net/params") == ("done", None)
        assert await server.outcome("warm-disk", "net/deep") == ("done", None)


async def test_interrupted_pin_is_not_left_pinned(server: Server, store: MemoryStore) -> None:
    store.block(method="read")
    handle = await server.open("net/.trims/params/pin")
    await store.arrived(1)
    server.release(handle)
    store.heal()
    await until(lambda: server.users() == 0)
    assert await server.attribute("net/params", "pinned") == "false"


async def test_failure_of_one_file_does_not_keep_the_rest_of_a_directory(
    server: Server, store: MemoryStore, sizes: dict[str, int]
) -> None:
    store.fail(StoreUnavailableError("the store is down"), times=float("inf"), key="net/params")
    assert await server.outcome("warm-disk", "") == ("failed", "StoreUnavailableError")
    for key, size in sizes.items():
        assert await on_disk(server, key) == (0 if key == "net/params" else size)


async def test_object_that_was_replaced_meanwhile_fails(server: Server, store: MemoryStore) -> None:
    await server.find("net/params")
    store.put("net/params", b"other content")
    assert await server.outcome("warm-disk", "net/params") == ("failed", "ObjectChangedError")
