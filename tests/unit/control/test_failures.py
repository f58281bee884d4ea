"""Commands that meet a failing disk: they fail, and the server that carries them goes on."""

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.parts import InLoop, content_of
from tests.support.served import served
from tests.support.stores import MemoryStore
from trimsfs.control.authorisation import Caller
from trimsfs.control.control_files import Control
from trimsfs.errors import WorkerLostError
from trimsfs.fetch.processes import thread_copier
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.host import page_cache
from trimsfs.tiers.index.index import BlobIndex

ROOT = Caller(uid=0, groups=frozenset())
Running = AbstractAsyncContextManager[tuple[Control, MemoryStore]]


@asynccontextmanager
async def controlled(directory: Path, chunk_size: int) -> AsyncIterator[tuple[Control, MemoryStore]]:
    """A control surface over a store of one model."""
    store = MemoryStore({"a": content_of("a", 2 * chunk_size)})
    async with served(store, directory, chunk_size=chunk_size) as server:
        yield server.control, store


@pytest.fixture
def running(tmp_path: Path, chunk_size: int) -> Running:
    return controlled(tmp_path / "cache", chunk_size)


async def give(control: Control, store: MemoryStore, command: str) -> dict[str, Any]:
    """Give a command for the model and read its progress to the end: the last line."""
    generation = store.generation("a")
    handle = await control.open(Inode(7, InodeKind.CONTROL_FILE, "a", generation, command), ROOT)
    text = b""
    with trio.fail_after(5):
        while piece := await handle.read(len(text), 4096):
            text += piece
    handle.close()
    last: dict[str, Any] = json.loads(text.splitlines()[-1])
    return last


async def fail_then_succeed(
    running: Running,
    command: str,
    patch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    error: Exception,
) -> str:
    """Give a command while a function fails and again when it does not; the error that it told of."""

    def fail(*_: object) -> None:
        raise error

    async with running as (control, store):
        with patch.context() as failing:
            failing.setattr(owner, name, fail)
            last = await give(control, store, command)
        assert last["state"] == "failed"
        assert (await give(control, store, command))["state"] == "done"
        return str(last["error"])


async def test_pinning_with_an_index_that_cannot_be_written(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    told = await fail_then_succeed(running, "pin", monkeypatch, BlobIndex, "set_pinned", error)
    assert "database or disk is full" in told


async def test_evicting_with_an_index_that_cannot_be_read(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    assert "disk I/O error" in await fail_then_succeed(running, "evict", monkeypatch, BlobIndex, "load", error)


async def test_warming_the_page_cache_from_a_disk_that_cannot_be_read(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What has just been written is in memory, and would not be read.
    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: 0)
    told = await fail_then_succeed(
        running, "warm-host", monkeypatch, thread_copier, "populate", OSError(5, "I/O error")
    )
    assert "I/O error" in told


async def test_loading_into_memory_outlives_fetch_processes(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    died = 0

    async def populate(*_: object) -> None:
        nonlocal died
        died += 1
        if died < 3:
            raise WorkerLostError("the fetch process died")

    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: 0)
    monkeypatch.setattr(InLoop, "populate", populate)
    async with running as (control, store):
        assert (await give(control, store, "pin"))["state"] == "done"
    assert died >= 3


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin"])
async def test_a_model_that_can_have_no_file(running: Running, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(24, "Too many open files")
    assert await fail_then_succeed(running, command, monkeypatch, Blob, "attach", error)


async def test_warming_an_empty_object(running: Running) -> None:
    async with running as (control, store):
        store.put("a", b"")
        for command in ("warm-disk", "warm-host", "pin", "unpin", "evict"):
            assert (await give(control, store, command))["state"] == "done"
