"""What attributes and control files tell, and whom."""

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.parts import until
from tests.support.served import MOUNTPOINT, OWNER, STRANGER, Server, Serving
from tests.support.stores import MemoryStore
from tests.unit.control.common import ATTRIBUTES, COMMANDS, IN_CONTROL_GROUP, in_memory, on_disk
from trimsfs import __version__
from trimsfs.control.reports import REST
from trimsfs.errors import BlobDamagedError, NoSuchEntryError, NotPermittedError, StoreAccessError
from trimsfs.namespace.listing import SLICE
from trimsfs.options import GPU_OFF, AccessRule
from trimsfs.tiers.disk.interfaces import Residency

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


# Control files


async def test_control_directories_list_what_they_hold(server: Server) -> None:
    assert await server.listing(".trims") == ["control", "gpu", "metrics", "models", "traces"]
    for directory in (".trims/.trims", ".trims/net", "net/.trims/.trims"):
        assert await server.listing(directory) == sorted(["files", "info", "jobs", *COMMANDS])
    for file in (".trims/empty", "net/.trims/params"):
        assert await server.listing(file) == sorted(["info", "tensors", *COMMANDS])
    assert await server.listing("net/.trims") == []


async def test_every_control_file_is_empty_to_look_at_and_uncached(server: Server) -> None:
    for path in (".trims/models", ".trims/metrics", ".trims/control", ".trims/empty/info", ".trims/empty/pin"):
        attributes = await server.find(path)
        assert (attributes.directory, attributes.size) == (False, 0)
        opened = await server.filesystem.files.open(attributes.inode.number, lambda: OWNER, nullcontext)
        assert not opened.keep_cache
        assert opened.direct_io
        server.filesystem.files.release(opened.handle)


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


async def test_control_tells_the_facts(
    server: Server, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The parent of these tests has mounts of other tests below it.
    monkeypatch.setattr("trimsfs.server.statistics.roles", lambda keeper: {"keeper": keeper})
    facts = json.loads(await server.content(".trims/control"))
    assert facts["options"].pop("store") == facts["store"] == store.identity
    assert facts.pop("options")["uid"] == OWNER.uid
    assert time.time() - facts.pop("started") < 60
    assert 0 < facts["descriptors"].pop("open") < facts["descriptors"].pop("limit")
    assert facts == {
        "version": __version__,
        "mountpoint": str(MOUNTPOINT),
        "store": store.identity,
        "server_pid": os.getpid(),
        "keeper_pid": os.getppid(),
        "keeper_problem": None,
        "keeper_stays": False,
        "restarts": 0,
        "processes": {"keeper": os.getppid()},
        "descriptors": {},
        "cache_dir": str(tmp_path / "cache"),
        "store_problem": None,
        "store_refuses": False,
        "store_empty": None,
        "store_known": True,
        "cache_problem": None,
        "cache_disk_bytes": facts["cache_disk_bytes"],
        "quarantine": [],
        "quarantine_problem": None,
        "log_file": facts["log_file"],
        "passthrough": {"used": False, "reason": "not wanted"},
        "kernel": {"release": os.uname().release, "lacks": facts["kernel"]["lacks"]},
        "waits": [],
        "gpu": {"unavailable": GPU_OFF, "socket": None, "devices": []},
    }


async def test_files_in_quarantine_are_told_to_who_may_read_them(serving: Serving) -> None:
    async with serving(access=(AccessRule(path="net", uid=5, mode=0o400),)) as server:
        await server.command("warm-disk", "")
        for blob in server.disk.blobs:
            if blob.generation.key in {"net/params", "other/params"}:
                blob.users += 1  # else it is evicted
                server.integrity.quarantine.add(blob, BlobDamagedError("damaged"))
        facts = json.loads(await server.content(".trims/control"))
        assert facts["quarantine"] == ["net/params", "other/params"]
        assert facts["quarantine_problem"] == "in quarantine: net/params, other/params"
        assert json.loads(await server.content(".trims/control", STRANGER))["quarantine"] == ["other/params"]
        assert (await server.info("net/params"))["quarantined"] is True
        assert (await server.info("net/symbol.json"))["quarantined"] is False
        for blob in server.disk.blobs:
            blob.users -= blob.health.quarantined


async def test_a_cache_that_can_hold_nothing_is_told(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(min_free=1 << 60) as server:
        problem = json.loads(await server.content(".trims/control"))["cache_problem"]
        assert problem == f"{server.disk.directory}: {problem.split()[1]} MiB available and --min-free keeps " + (
            f"{1 << 40}: models are not cached: free some space, lower --min-free or set --cache-dir"
        )
        await until(lambda: "nothing is cached: " in caplog.text)
    caplog.clear()
    async with serving(min_free=1 << 60, cache_size=0) as server:  # nothing shall be
        assert json.loads(await server.content(".trims/control"))["cache_problem"] is None
    async with serving(cache_size=1 << 60) as server:
        facts = json.loads(await server.content(".trims/control"))
        assert (facts["cache_problem"], facts["cache_disk_bytes"] < 1 << 60) == (None, True)
        await until(lambda: " MiB, less than --cache-size" in caplog.text)
    assert "nothing is cached" not in caplog.text


async def test_control_tells_the_options_to_who_may_command_only(server: Server) -> None:
    facts = json.loads(await server.content(".trims/control", STRANGER))
    assert {"options", "waits"}.isdisjoint(facts)
    assert facts["mountpoint"] == str(MOUNTPOINT)


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
    nothing = {"verified": False, "pinned": False, "open": 0, "uses": 0, "last_used": None, "version_id": None}
    identity = {"etag": generation.etag, "generation": generation.token(store.identity)}
    cold = await server.info("net/params")
    assert cold == cold | nothing | identity | {
        "path": "net/params",
        "size": sizes["net/params"],
        "modified": generation.modified_ns / 1e9,
        "residency": {"disk": 0, "host": 0, "gpu": {}},
    }
    assert store.count("read") == 0

    await server.command("pin", "net/params")
    handle = await server.open("net/params")
    warm = await server.info("net/params")
    assert warm == warm | {"verified": True, "pinned": True, "open": 1}
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


async def inventory(server: Server, path: str) -> tuple[dict[str, int], dict[str, Any]]:
    """What is told of the files of a directory, and of those that are here."""
    files, here = dict[str, int](), dict[str, Any]()
    for line in (await server.content(await server.control_file(path, "files"))).splitlines():
        told = json.loads(line)
        files |= {told["path"] + name: size for name, size in told["files"].items()}
        here |= {told["path"] + name: facts for name, facts in told["here"].items()}
    return files, here


async def test_files_are_all_below_a_directory_and_what_is_here_of_them(
    server: Server, store: MemoryStore, sizes: dict[str, int]
) -> None:
    await server.command("warm-disk", "net/deep")
    files, here = await inventory(server, "")
    assert (files, set(here)) == (sizes, {"net/deep/er/weights"})
    alone = await server.info("net/deep/er/weights")
    assert {name: here["net/deep/er/weights"][name] for name in ("generation", "residency", "open", "pinned")} == {
        name: alone[name] for name in ("generation", "residency", "open", "pinned")
    }
    files, here = await inventory(server, "net/deep")
    assert (set(files), set(here)) == ({"net/deep/er/weights"}, {"net/deep/er/weights"})
    store.put("net/deep/er/weights", b"another content")
    await server.content(".trims/.trims/refresh")
    assert await inventory(server, "net/deep") == ({"net/deep/er/weights": 15}, {})


async def test_files_are_told_by_listings_and_the_kernel_knows_none_of_them(
    serving: Serving, store: MemoryStore
) -> None:
    for number in range(3 * SLICE):
        store.put(f"many/{number}", b"x" * (number % 7))
    async with serving() as server:
        before, known = len(store.requests), server.filesystem.known_files()
        files, _ = await inventory(server, "many")
        assert files == {f"many/{number}": number % 7 for number in range(3 * SLICE)}
        assert {request.method for request in store.requests[before:]} == {"list_page"}
        assert server.filesystem.known_files() < known + 10


async def test_reading_files_goes_on_where_it_was_interrupted(server: Server, store: MemoryStore) -> None:
    handle = await server.open(".trims/.trims/files")
    gate = store.block(method="list_page", key="net/deep/")
    text = b""
    while b'"net/"' not in text:
        text += await server.read(handle, len(text))
    with trio.move_on_after(0.01) as scope:
        await server.read(handle, len(text))
    assert scope.cancelled_caught
    gate.set()
    while piece := await server.read(handle, len(text), 10):
        text += piece
    assert b'"weights"' in text


async def test_directories_that_the_store_may_not_list_are_left_out_and_told(
    server: Server, store: MemoryStore
) -> None:
    store.fail(StoreAccessError("not allowed"), times=float("inf"), method="list_page", key="net/deep/")
    files, _ = await inventory(server, "")
    assert "net/params" in files
    assert "net/deep/er/weights" not in files
    lines = [json.loads(line) for line in (await server.content(".trims/.trims/files")).splitlines()]
    assert {line["path"]: line["refused"] for line in lines if "refused" in line} == {"net/deep/": "not allowed"}
    with pytest.raises(StoreAccessError):
        await inventory(server, "net/deep")


async def test_directories_that_the_caller_may_not_list_are_left_out(serving: Serving) -> None:
    async with serving(access=(AccessRule(path="net", uid=5, mode=0o400),)) as server:
        for caller, told in ((OWNER, True), (STRANGER, False)):
            text = await server.content(".trims/.trims/files", caller)
            assert (b'"other/"' in text, b"net" in text) == (True, told)
        with pytest.raises(StoreAccessError, match="uid 2000 may not list it"):
            await server.content(".trims/net/files", STRANGER)


async def test_models_are_all_that_is_here(server: Server, sizes: dict[str, int]) -> None:
    for path in ("other/params", "net/params"):
        await server.command("warm-disk", path)
    await in_memory(server, "other/params", "net/params")  # which is a use
    for _ in range(100):  # uses are recorded some at a time, maybe between two looks
        models = json.loads(await server.content(".trims/models"))["models"]
        alone = [await server.info("net/params"), await server.info("other/params")]
        if models == alone:
            break
        await trio.sleep(0.02)
    assert models == alone
    assert [model["size"] for model in models] == [sizes["net/params"], sizes["other/params"]]


async def test_a_user_who_asks_again_and_again_leaves_the_server_to_others(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a report the same user waits, and nobody else."""
    took_s, residencies = 0.1, server.disk.residencies.all

    async def slowly() -> list[Residency]:
        await trio.sleep(took_s)
        return await residencies()

    monkeypatch.setattr(server.disk.residencies, "all", slowly)
    began = trio.current_time()
    for path in (".trims/models", ".trims/net/info", ".trims/net/files"):
        await server.content(path, STRANGER)
    assert trio.current_time() - began > 3 * took_s + 2 * REST * took_s
    began = trio.current_time()
    await server.content(".trims/models", OWNER)
    assert trio.current_time() - began < REST * took_s


async def test_name_that_is_not_utf8_can_be_told(server: Server, store: MemoryStore) -> None:
    store.put("late/\udce9t\udce9", b"latin-1")
    await server.command("warm-disk", "late")
    (model,) = json.loads(await server.content(".trims/models"))["models"]
    assert model["path"] == "late/\N{REPLACEMENT CHARACTER}t\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ["control", "metrics", "models", "info", "evict", "subject", "warm-disk"])
async def test_object_or_directory_may_have_the_name_of_a_control_file(
    serving: Serving, store: MemoryStore, name: str
) -> None:
    keys = (name, f"folder/{name}", f"folder/below/{name}/params")
    for key in keys:
        store.put(key, b"an object")
    async with serving() as server:
        for key in keys:
            assert await server.content(key) == b"an object"
            assert await server.attribute(key, "etag") == store.generation(key).etag
        assert {"control", "gpu", "metrics", "models", "traces"} == set(await server.listing(".trims"))
        assert b"models" in await server.content(".trims/models")
        at_root = name not in {"control", "metrics", "models"}  # else `.trims/NAME` is the mount's
        for path in (*[name] * at_root, f"folder/{name}", f"folder/below/{name}"):
            assert await server.outcome("pin", path) == ("done", None)
        assert [await server.attribute(key, "pinned") == "true" for key in keys] == [at_root, True, True]
        assert (await server.info(f"folder/{name}"))["size"] == 9


# Who may command


@pytest.mark.parametrize("command", COMMANDS)
async def test_others_may_not_command(server: Server, store: MemoryStore, command: str) -> None:
    for path in ("other/params", "other", ""):
        with pytest.raises(NotPermittedError, match=f"{command}.*2000"):
            await server.command(command, path, STRANGER)
        assert await server.content(await server.control_file(path, "info"), STRANGER)  # who may look
    assert store.count("read") == 0
    assert server.users() == 0
    assert json.loads(await server.content(".trims/models"))["models"] == []


async def test_without_a_control_group_no_group_may_command(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.served.CONTROL_GID", None)
    async with serving() as server:
        with pytest.raises(NotPermittedError):
            await server.command("pin", "net/params", IN_CONTROL_GROUP)
        assert await server.outcome("pin", "net/params") == ("done", None)
