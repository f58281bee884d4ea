import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.fakes import MemoryStore
from tests.unit.parts import blob_files, content_of, flip_byte, until
from tests.unit.served import CONTROL_GID, OWNER, STRANGER, Server, served
from trimsfs import metrics
from trimsfs.commands import FILES_AT_ONCE
from trimsfs.control import Caller
from trimsfs.errors import NoSuchEntryError, NotPermittedError, StoreAccessError, StoreUnavailableError
from trimsfs.tiers import pages
from trimsfs.tiers.pages import resident_bytes

Serving = Callable[..., AbstractAsyncContextManager[Server]]
COMMANDS = ("evict", "pin", "unpin", "verify", "warm-disk", "warm-host")
ATTRIBUTES = ("digest", "etag", "generation", "pinned", "residency", "verified")
ROOT = Caller(uid=0, groups=frozenset({0}))
IN_CONTROL_GROUP = Caller(uid=2000, groups=frozenset({2000, CONTROL_GID}))


@pytest.fixture
def sizes(chunk_size: int) -> dict[str, int]:
    """The sizes of the objects in the store."""
    return {
        "net/params": 5 * chunk_size - 100,
        "net/symbol.json": 2,
        "net/deep/er/weights": chunk_size,
        "other/params": 2 * chunk_size,
        "empty": 0,
    }


@pytest.fixture
def store(sizes: dict[str, int]) -> MemoryStore:
    return MemoryStore({key: content_of(key, size) for key, size in sizes.items()})


@pytest.fixture
def serving(store: MemoryStore, tmp_path: Path, chunk_size: int) -> Serving:
    """Starts a server on the store; always with the same cache."""
    return partial(served, store, tmp_path / "cache", chunk_size=chunk_size)


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


async def on_disk(server: Server, path: str) -> int:
    """Bytes of a file on disk, as its attribute tells."""
    residency: dict[str, Any] = json.loads(await server.attribute(path, "residency") or "{}")
    return int(residency["disk"])


async def in_memory(server: Server, *paths: str) -> None:
    """Wait until files that are on disk have been brought into memory, which nobody waits for."""
    size = sum([await on_disk(server, path) for path in paths])
    await until(lambda: server.host.statistics().used_bytes == size and server.users() == 0)


# Attributes


async def test_objects_have_attributes_and_nothing_else_has(server: Server) -> None:
    names = [f"user.trims.{name}" for name in ATTRIBUTES]
    assert sorted(server.filesystem.xattr_names(await server.number("net/params"))) == names
    assert sorted(server.filesystem.xattr_names(await server.number("empty"))) == names
    for path in ("", "net", ".trims", ".trims/models", "net/.trims/params", "net/.trims/params/info"):
        number = await server.number(path)
        assert server.filesystem.xattr_names(number) == []
        for name in ATTRIBUTES:
            assert await server.filesystem.xattr(number, f"user.trims.{name}", lambda: OWNER) is None


@pytest.mark.parametrize(
    "name", ["user.trims.absent", "user.trims.", "user.etag", "etag", "security.etag", "trusted.trims.etag", "x" * 255]
)
async def test_attribute_that_does_not_exist(server: Server, name: str) -> None:
    assert await server.filesystem.xattr(await server.number("net/params"), name, lambda: OWNER) is None


async def test_attributes_tell_what_is_here(server: Server, store: MemoryStore, sizes: dict[str, int]) -> None:
    async def attributes() -> dict[str, str | None]:
        return {name: await server.attribute("net/params", name) for name in ATTRIBUTES}

    generation = store.generation("net/params")
    cold = await attributes()
    assert cold["etag"] == generation.etag
    assert cold["generation"] == generation.token(store.identity)
    assert (cold["pinned"], cold["verified"]) == ("false", "false")
    assert json.loads(cold["residency"] or "") == {"disk": 0, "host": 0, "gpu": {}}

    await server.command("pin", "net/params")
    warm = await attributes()
    assert (warm["etag"], warm["generation"]) == (cold["etag"], cold["generation"])
    assert (warm["pinned"], warm["verified"]) == ("true", "true")
    residency = json.loads(warm["residency"] or "")
    assert residency["disk"] == sizes["net/params"]
    assert residency["host"] is None or residency["host"] >= sizes["net/params"]


async def test_looking_at_attributes_fetches_nothing(server: Server, store: MemoryStore) -> None:
    for name in ATTRIBUTES:
        await server.attribute("net/params", name)
    await server.info("net/params")
    await server.info("net")
    assert store.count("read") == 0
    assert json.loads(await server.content(".trims/models"))["models"] == []


async def test_what_an_earlier_server_left_is_not_verified_until_it_is_read(
    serving: Serving, sizes: dict[str, int]
) -> None:
    async with serving() as server:
        await server.command("warm-disk", "net/params")
    async with serving() as server:
        assert await on_disk(server, "net/params") == sizes["net/params"]
        assert await server.attribute("net/params", "verified") == "false"
        await server.content("net/params")
        assert await server.attribute("net/params", "verified") == "true"


async def test_new_generation_has_its_own_attributes(serving: Serving, store: MemoryStore) -> None:
    async with serving(ttl_s=0) as server:
        await server.command("pin", "net/params")
        old = await server.attribute("net/params", "generation")
        store.put("net/params", b"other content")
        assert await server.attribute("net/params", "generation") != old
        assert await server.attribute("net/params", "pinned") == "false"
        assert await on_disk(server, "net/params") == 0


# Control files


async def test_control_directories_list_what_they_hold(server: Server) -> None:
    assert await server.listing(".trims") == ["control", "gpu", "metrics", "models"]
    for directory in (".trims/.trims", ".trims/net", "net/.trims/.trims"):
        assert await server.listing(directory) == sorted(["info", *COMMANDS])
    for file in (".trims/empty", "net/.trims/params"):
        assert await server.listing(file) == sorted(["info", "tensors", *COMMANDS])
    assert await server.listing("net/.trims") == []


async def test_every_control_file_is_empty_to_look_at_and_uncached(server: Server) -> None:
    for path in (".trims/models", ".trims/metrics", ".trims/control", ".trims/empty/info", ".trims/empty/pin"):
        attributes = await server.find(path)
        assert (attributes.directory, attributes.size) == (False, 0)
        opened = await server.filesystem.open(attributes.inode.number, lambda: OWNER, nullcontext)
        assert not opened.cached
        assert opened.direct
        server.filesystem.release(opened.handle)


@pytest.mark.parametrize(
    "path",
    [
        ".trims/absent",
        "net/.trims/absent",
        "net/.trims/models",
        ".trims/empty/absent",
        ".trims/empty/models",
        ".trims/empty/.trims",
        ".trims/net/params",
        ".trims/.trims/empty",
        ".trims/net/tensors",
    ],
)
async def test_control_file_that_does_not_exist(server: Server, path: str) -> None:
    with pytest.raises(NoSuchEntryError):
        await server.find(path)


async def test_control_tells_the_facts(server: Server, store: MemoryStore) -> None:
    assert json.loads(await server.content(".trims/control")) == {"store": store.identity}


async def test_metrics_are_those_of_the_moment(server: Server, sizes: dict[str, int]) -> None:
    fetched = "trimsfs_fetch_fetched_bytes_total"
    assert metrics.parse((await server.content(".trims/metrics")).decode())[fetched] == 0
    await server.content("net/params")
    assert metrics.parse((await server.content(".trims/metrics")).decode())[fetched] == sizes["net/params"]


async def test_open_control_file_does_not_change(server: Server) -> None:
    handle = await server.open(".trims/models")
    before = await server.read(handle)
    await server.command("warm-disk", "net/params")
    assert await server.read(handle) == before
    assert await server.read(handle, 10, 5) == before[10:15]
    assert await server.read(handle, len(before), 100) == b""
    assert await server.content(".trims/models") != before


async def test_info_of_a_file(server: Server, store: MemoryStore, sizes: dict[str, int]) -> None:
    generation = store.generation("net/params")
    cold = await server.info("net/params")
    assert cold["path"] == "net/params"
    assert cold["size"] == sizes["net/params"]
    assert cold["etag"] == generation.etag
    assert cold["generation"] == generation.token(store.identity)
    assert cold["modified"] == generation.modified_ns / 1e9
    assert cold["version_id"] is None
    assert cold["residency"] == {"disk": 0, "host": 0, "gpu": {}}
    assert (cold["verified"], cold["pinned"], cold["open"], cold["uses"], cold["last_used"]) == (
        False,
        False,
        0,
        0,
        None,
    )

    await server.command("pin", "net/params")
    handle = await server.open("net/params")
    warm = await server.info("net/params")
    assert (warm["verified"], warm["pinned"], warm["open"]) == (True, True, 1)
    assert warm["residency"]["disk"] == sizes["net/params"]
    assert warm["uses"] >= 1
    assert warm["last_used"] > 1_600_000_000
    server.release(handle)
    assert (await server.info("net/params"))["open"] == 0


async def test_info_of_a_directory_is_about_what_is_here_of_it(server: Server, sizes: dict[str, int]) -> None:
    for path in ("net/params", "net/deep/er/weights", "other/params"):
        await server.command("warm-disk", path)
    below: dict[str, list[str]] = {
        "": ["net/deep/er/weights", "net/params", "other/params"],
        "net": ["net/deep/er/weights", "net/params"],
        "net/deep": ["net/deep/er/weights"],
        "other": ["other/params"],
    }
    for path, expected in below.items():
        info = await server.info(path)
        assert info["path"] == (f"{path}/" if path else "")
        assert [model["path"] for model in info["models"]] == expected
        assert [model["residency"]["disk"] for model in info["models"]] == [sizes[key] for key in expected]


async def test_models_are_all_that_is_here(server: Server, sizes: dict[str, int]) -> None:
    for path in ("other/params", "net/params"):
        await server.command("warm-disk", path)
    await in_memory(server, "other/params", "net/params")  # which is a use
    models = json.loads(await server.content(".trims/models"))["models"]
    assert models == [await server.info("net/params"), await server.info("other/params")]
    assert [model["size"] for model in models] == [sizes["net/params"], sizes["other/params"]]


async def test_name_that_is_not_utf8_can_be_told(server: Server, store: MemoryStore) -> None:
    store.put("late/\udce9t\udce9", b"latin-1")
    await server.command("warm-disk", "late")
    (model,) = json.loads(await server.content(".trims/models"))["models"]
    assert model["path"] == "late/\N{REPLACEMENT CHARACTER}t\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ["control", "metrics", "models", "info", "evict", "subject", "warm-disk"])
async def test_object_may_have_the_name_of_a_control_file(serving: Serving, store: MemoryStore, name: str) -> None:
    for key in (name, f"folder/{name}"):
        store.put(key, b"an object")
    async with serving() as server:
        for key in (name, f"folder/{name}"):
            assert await server.content(key) == b"an object"
            assert await server.attribute(key, "etag") == store.generation(key).etag
        assert (await server.info(f"folder/{name}"))["size"] == 9
        assert {"control", "gpu", "metrics", "models"} == set(await server.listing(".trims"))
        assert b"models" in await server.content(".trims/models")


@pytest.mark.parametrize("name", ["info", "evict", "subject"])
async def test_object_with_the_name_of_a_command_can_be_commanded(
    serving: Serving, store: MemoryStore, name: str
) -> None:
    store.put(name, b"an object")
    async with serving() as server:
        assert (await server.info(name))["size"] == 9
        assert await server.outcome("pin", name) == ("done", None)
        assert await server.attribute(name, "pinned") == "true"


@pytest.mark.parametrize("name", ["control", "metrics", "models"])
async def test_directory_with_the_name_of_a_control_file_can_be_commanded(
    serving: Serving, store: MemoryStore, name: str
) -> None:
    store.put(f"{name}/params", b"an object")
    async with serving() as server:
        assert await server.outcome("warm-disk", name) == ("done", None)
        assert await on_disk(server, f"{name}/params") == 9


# Commands


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
        "compared_copies": 0,
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
    monkeypatch.setattr("trimsfs.transfer.populate", lambda _descriptor, start, stop: ranges.append((start, stop)))
    monkeypatch.setattr(pages, "resident_bytes", lambda _descriptor: 0)
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


async def test_pinned_file_is_not_evicted_until_it_is_unpinned(server: Server, sizes: dict[str, int]) -> None:
    await server.command("pin", "net/params")
    assert await server.outcome("evict", "net/params") == ("failed", "InUseError")
    assert await on_disk(server, "net/params") == sizes["net/params"]
    assert await server.outcome("unpin", "net/params") == ("done", None)
    assert await server.attribute("net/params", "pinned") == "false"
    assert await on_disk(server, "net/params") == sizes["net/params"]
    assert await server.outcome("evict", "net/params") == ("done", None)
    assert await on_disk(server, "net/params") == 0


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
        here = await server.disk.residency(store.generation("other/params"))
        assert here.disk_bytes == here.generation.size
        assert not here.pinned


async def test_pinned_directory_is_unpinned_as_one(server: Server) -> None:
    await server.command("pin", "net")
    assert [model["pinned"] for model in (await server.info("net"))["models"]] == [True] * 3
    await server.command("unpin", "net")
    assert [model["pinned"] for model in (await server.info("net"))["models"]] == [False] * 3


async def test_pinned_file_stays_when_others_need_the_room(
    serving: Serving, sizes: dict[str, int], chunk_size: int
) -> None:
    async with serving(budget=6 * chunk_size) as server:
        await server.command("pin", "other/params")
        for _ in range(2):
            await server.content("net/params")
            assert await on_disk(server, "other/params") == sizes["other/params"]


@pytest.mark.parametrize("of", ["net/params", "net", ""])
async def test_unpinning_reaches_what_has_been_replaced_since(
    serving: Serving, store: MemoryStore, sizes: dict[str, int], of: str
) -> None:
    """Nothing else could: it would be on disk, and locked in memory, for ever."""
    async with serving(ttl_s=0) as server:
        await server.command("pin", "net/params")
        store.put("net/params", b"other content")
        assert server.host.statistics().locked_bytes == sizes["net/params"]
        assert await server.outcome("unpin", of) == ("done", None)
        assert server.host.statistics().locked_bytes == 0
        assert [here.pinned for here in await server.disk.residencies()] == [False]


async def test_a_pin_that_is_given_up_takes_no_other_with_it(server: Server, store: MemoryStore) -> None:
    file = await server.control_file("net/params", "pin")
    gate = store.block(method="read")
    first, second = await server.open(file), await server.open(file)
    await store.arrived(1)
    server.release(first)
    gate.set()
    text = b""
    while piece := await server.read(second, len(text), 4096):
        text += piece
    assert json.loads(text.splitlines()[-1])["state"] == "done"
    assert await server.attribute("net/params", "pinned") == "true"


async def test_evicting_removes_the_file_and_its_bytes(server: Server, tmp_path: Path, store: MemoryStore) -> None:
    await server.command("warm-disk", "net/params")
    assert len(blob_files(tmp_path / "cache")) == 1
    lines = await server.command("evict", "net/params")
    assert lines[-1]["state"] == "done"
    assert blob_files(tmp_path / "cache") == []
    assert server.disk.statistics().used_bytes == 0
    assert (await server.info("net/params"))["verified"] is False
    assert await server.content("net/params") == content_of("net/params", store.generation("net/params").size)


async def test_evicting_what_is_not_here_does_nothing(server: Server, store: MemoryStore) -> None:
    assert await server.outcome("evict", "net/params") == ("done", None)
    assert await server.outcome("evict", "empty") == ("done", None)
    assert store.count("read") == 0


async def test_evicting_a_directory_leaves_its_neighbours(server: Server, sizes: dict[str, int]) -> None:
    await server.command("warm-disk", "")
    assert await server.outcome("evict", "net") == ("done", None)
    for key, size in sizes.items():
        assert await on_disk(server, key) == (0 if key.startswith("net/") else size)


async def test_open_file_is_not_evicted_until_it_is_closed(server: Server, sizes: dict[str, int]) -> None:
    await server.command("warm-disk", "net/params")
    handle = await server.open("net/params")
    lines = await server.command("evict", "net/params")
    assert (lines[-1]["state"], lines[-1]["kind"]) == ("failed", "InUseError")
    assert "net/params" in lines[-1]["error"]
    assert await on_disk(server, "net/params") == sizes["net/params"]
    server.release(handle)
    assert await server.outcome("evict", "net/params") == ("done", None)


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
async def test_warming_more_than_the_cache_may_hold_fails(serving: Serving, chunk_size: int, command: str) -> None:
    async with serving(budget=3 * chunk_size) as server:
        lines = await server.command(command, "net/params")
        assert (lines[-1]["state"], lines[-1]["kind"]) == ("failed", "CacheFullError")
        assert "net/params" in lines[-1]["error"]
        assert server.disk.statistics().used_bytes <= 3 * chunk_size


async def test_what_fits_can_be_warmed_right_after_what_does_not(serving: Serving, chunk_size: int) -> None:
    async with serving(budget=3 * chunk_size) as server:
        assert await server.outcome("warm-disk", "net/params") == ("failed", "CacheFullError")
        assert await server.outcome("warm-disk", "other/params") == ("done", None)


async def test_interrupted_pin_is_not_left_pinned(server: Server, store: MemoryStore) -> None:
    store.block(method="read")
    handle = await server.open("net/.trims/params/pin")
    await store.arrived(1)
    server.release(handle)
    store.heal()
    await until(lambda: server.users() == 0)
    assert await server.attribute("net/params", "pinned") == "false"


async def test_what_does_not_fit_is_not_left_pinned(serving: Serving, chunk_size: int) -> None:
    async with serving(budget=3 * chunk_size) as server:
        assert await server.outcome("pin", "net/params") == ("failed", "CacheFullError")
        assert await server.attribute("net/params", "pinned") == "false"
        await until(lambda: server.users() == 0)  # requests that were under way
        assert await server.outcome("evict", "net/params") == ("done", None)


async def test_failure_of_one_file_does_not_keep_the_rest_of_a_directory(
    server: Server, store: MemoryStore, sizes: dict[str, int]
) -> None:
    store.fail(StoreUnavailableError("the store is down"), times=float("inf"), key="net/params")
    assert await server.outcome("warm-disk", "") == ("failed", "StoreUnavailableError")
    for key, size in sizes.items():
        assert await on_disk(server, key) == (0 if key == "net/params" else size)


async def test_directory_that_cannot_be_listed_fails(server: Server, store: MemoryStore) -> None:
    store.fail(StoreAccessError("not allowed"), times=float("inf"), method="list_page", key="net/deep/")
    lines = await server.command("warm-disk", "net")
    assert (lines[-1]["state"], lines[-1]["kind"], lines[-1]["error"]) == (
        "failed",
        "StoreAccessError",
        "not allowed",
    )


async def test_object_that_was_replaced_meanwhile_fails(server: Server, store: MemoryStore) -> None:
    await server.find("net/params")
    store.put("net/params", b"other content")
    assert await server.outcome("warm-disk", "net/params") == ("failed", "ObjectChangedError")


# How a command tells of itself


async def test_progress_is_one_line_of_json_a_read_until_the_end(
    server: Server, store: MemoryStore, sizes: dict[str, int], chunk_size: int
) -> None:
    gate = store.block(method="read", offset=4 * chunk_size)
    handle = await server.open(await server.control_file("net/params", "warm-disk"))
    lines: list[dict[str, Any]] = []
    text = b""
    while piece := await server.read(handle, len(text), 4096):
        assert piece.endswith(b"\n")
        assert piece.count(b"\n") == 1
        lines.append(json.loads(piece))
        text += piece
        if lines[-1]["done_bytes"] == 4 * chunk_size:
            gate.set()

    assert [line["state"] for line in lines] == ["running"] * (len(lines) - 1) + ["done"]
    assert {line["path"] for line in lines} == {"net/params"}
    assert lines[-1]["done_bytes"] == lines[-1]["total_bytes"] == sizes["net/params"]
    done = [line["done_bytes"] for line in lines]
    assert 4 * chunk_size in done
    assert done == sorted(done)
    assert await server.read(handle, 0, 1 << 20) == text
    assert await server.read(handle, 3, 10) == text[3:13]
    assert await server.read(handle, len(text), 4096) == b""


async def test_first_line_comes_at_once(server: Server, store: MemoryStore) -> None:
    file = await server.control_file("net", "warm-disk")
    store.block()
    handle = await server.open(file)
    with trio.fail_after(0.2):
        line = json.loads(await server.read(handle, 0, 4096))
    assert line["state"] == "running"


async def test_line_longer_than_a_read_is_read_in_pieces(server: Server) -> None:
    handle = await server.open(await server.control_file("net/params", "warm-disk"))
    text = b""
    while piece := await server.read(handle, len(text), 7):
        assert len(piece) <= 7
        text += piece
    assert json.loads(text.splitlines()[-1])["state"] == "done"


async def test_progress_never_goes_back_while_the_host_is_warmed(
    server: Server, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], chunk_size: int
) -> None:
    fetched = store.block(method="read", offset=4 * chunk_size)
    populated = threading.Event()
    monkeypatch.setattr("trimsfs.transfer.populate", lambda *_: populated.wait(5))
    monkeypatch.setattr(pages, "resident_bytes", lambda _descriptor: 0)
    handle = await server.open(await server.control_file("net/params", "warm-host"))
    done: list[int] = []
    offset = 0
    while piece := await server.read(handle, offset, 4096):
        offset += len(piece)
        done.append(json.loads(piece)["done_bytes"])
        if done.count(4 * chunk_size) == 1:
            fetched.set()
        if await on_disk(server, "net/params") == sizes["net/params"]:
            populated.set()  # after a line was told in which only this was left to do
    assert done == sorted(done)
    assert done[-1] == sizes["net/params"]


async def test_who_is_cancelled_begins_no_fetch(server: Server, store: MemoryStore) -> None:
    async with server.disk.using(store.generation("net/params")) as blob:
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.fetcher.fetch_all(blob)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert store.count("read") == 0


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
async def test_closing_ends_the_command(server: Server, store: MemoryStore, command: str) -> None:
    store.block(method="read")
    handle = await server.open(await server.control_file("", command))
    await store.arrived(1)
    server.release(handle)
    await until(lambda: server.users() == server.fetcher.statistics().in_flight)
    started = server.fetcher.statistics().in_flight
    store.heal()
    await until(lambda: server.users() == 0)
    assert server.fetcher.statistics().in_flight == 0
    assert store.count("read") <= started
    assert await server.outcome("evict", "net/params") in {("done", None), ("failed", "InUseError")}


async def test_two_commands_for_one_file_are_independent(
    server: Server, store: MemoryStore, sizes: dict[str, int]
) -> None:
    store.block(method="read")
    file = await server.control_file("net/params", "warm-disk")
    first, second = await server.open(file), await server.open(file)
    await store.arrived(1)
    server.release(first)
    store.heal()
    text = b""
    while piece := await server.read(second, len(text), 4096):
        text += piece
    assert json.loads(text.splitlines()[-1])["state"] == "done"
    assert await on_disk(server, "net/params") == sizes["net/params"]
    assert sum(store.fetched.values()) == sizes["net/params"]


# Who may command


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("caller", [OWNER, ROOT, IN_CONTROL_GROUP], ids=["owner", "root", "control group"])
async def test_some_may_command(server: Server, command: str, caller: Caller) -> None:
    for path in ("other/params", "other", ""):
        assert (await server.command(command, path, caller))[-1]["state"] in {"done", "failed"}
    if command.startswith("warm"):
        assert await on_disk(server, "other/params") > 0


@pytest.mark.parametrize("command", COMMANDS)
async def test_others_may_not_command(server: Server, store: MemoryStore, command: str) -> None:
    for path in ("other/params", "other", ""):
        with pytest.raises(NotPermittedError, match=f"{command}.*2000"):
            await server.command(command, path, STRANGER)
    assert store.count("read") == 0
    assert server.users() == 0
    assert json.loads(await server.content(".trims/models"))["models"] == []


async def test_without_a_control_group_no_group_may_command(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.served.CONTROL_GID", None)
    async with serving() as server:
        with pytest.raises(NotPermittedError):
            await server.command("pin", "net/params", IN_CONTROL_GROUP)
        assert await server.outcome("pin", "net/params") == ("done", None)


async def test_everyone_may_look(server: Server) -> None:
    for path in (".trims/control", ".trims/models", ".trims/metrics", ".trims/net/info", "net/.trims/params/info"):
        assert await server.content(path, STRANGER)


def drop(descriptor: int) -> None:
    """Have the kernel drop a file's pages."""
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
