"""How a command tells of itself, and how it is ended."""

import json
import threading
from typing import Any

import pytest
import trio
import trio.testing

from tests.support.parts import content_of, until
from tests.support.served import Server
from tests.support.stores import MemoryStore
from tests.unit.control.common import last_line, on_disk
from trimsfs.tiers.host import page_cache


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


async def test_first_line_comes_at_once(server: Server, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.control.progress.PROGRESS_INTERVAL_S", 60.0)
    file = await server.control_file("net", "warm-disk")
    store.block()
    handle = await server.open(file)
    with trio.fail_after(5):
        line = json.loads(await server.read(handle, 0, 4096))
    assert line["state"] == "running"


async def test_progress_never_goes_back_while_the_host_is_warmed(
    server: Server, store: MemoryStore, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], chunk_size: int
) -> None:
    fetched = store.block(method="read", offset=4 * chunk_size)
    populated = threading.Event()
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.populate", lambda *_: populated.wait(5))
    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: 0)
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
    async with server.disk.blobs.using(store.generation("net/params")) as blob:
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.fetcher.fetch_all(blob)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert store.count("read") == 0


async def test_two_commands_for_one_file_are_independent(
    server: Server, store: MemoryStore, sizes: dict[str, int]
) -> None:
    store.block(method="read")
    file = await server.control_file("net/params", "warm-disk")
    first, second = await server.open(file), await server.open(file)
    await store.arrived(1)
    server.release(first)
    store.heal()
    assert (await last_line(server, second))["state"] == "done"
    assert await on_disk(server, "net/params") == sizes["net/params"]
    assert sum(store.fetched.values()) == sizes["net/params"]


async def test_what_a_reader_waits_for_goes_on_when_a_command_ends(
    server: Server, store: MemoryStore, sizes: dict[str, int]
) -> None:
    gate = store.block(method="read")
    command = await server.open(await server.control_file("net/params", "warm-disk"))
    await store.arrived(1)
    file, read = await server.open("net/params"), list[bytes]()

    async def read_first() -> None:
        read.append(await server.read(file, 0, 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_first)
        await trio.testing.wait_all_tasks_blocked()
        server.release(command)
        await trio.sleep(0.2)
        gate.set()
    assert read == [content_of("net/params", sizes["net/params"])[:10]]
    await until(lambda: server.fetcher.statistics().in_flight == 0)
    assert store.reads("net/params").count(0) == 1
    server.release(file)
