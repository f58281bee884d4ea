"""Commands that meet a failing disk: they fail, and the server that carries them goes on."""

import sqlite3

import pytest

from tests.support.parts import InLoop, content_of
from tests.support.served import Server
from tests.support.stores import MemoryStore
from trimsfs.errors import WorkerLostError
from trimsfs.fetch.processes import thread_copier
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.host import page_cache
from trimsfs.tiers.index.index import BlobIndex


@pytest.fixture
def store(chunk_size: int) -> MemoryStore:
    return MemoryStore({"a": content_of("a", 2 * chunk_size), "empty": b""})


@pytest.mark.parametrize(
    ("command", "owner", "name", "error"),
    [
        ("pin", BlobIndex, "set_pinned", sqlite3.OperationalError("database or disk is full")),
        ("evict", BlobIndex, "load", sqlite3.OperationalError("disk I/O error")),
        ("warm-host", thread_copier, "populate", OSError(5, "I/O error")),
        ("warm-disk", Blob, "attach", OSError(24, "Too many open files")),
        ("warm-host", Blob, "attach", OSError(24, "Too many open files")),
        ("pin", Blob, "attach", OSError(24, "Too many open files")),
    ],
)
async def test_a_command_tells_what_the_disk_fails_with_and_succeeds_afterwards(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: str,
    owner: object,
    name: str,
    error: Exception,
) -> None:
    # What has just been written is in memory, and would not be read.
    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: 0)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(owner, name, fail)
        *_, last = await server.command(command, "a")
    assert last["state"] == "failed"
    assert str(error.args[-1]) in last["error"] + caplog.text
    assert await server.outcome(command, "a") == ("done", None)


async def test_loading_into_memory_outlives_fetch_processes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    died = 0

    async def populate(*_: object) -> None:
        nonlocal died
        died += 1
        if died < 3:
            raise WorkerLostError("the fetch process died")

    monkeypatch.setattr(page_cache, "resident_bytes", lambda _descriptor: 0)
    monkeypatch.setattr(InLoop, "populate", populate)
    assert await server.outcome("pin", "a") == ("done", None)
    assert died >= 3


@pytest.mark.parametrize("command", ["warm-disk", "warm-host", "pin", "unpin", "evict"])
async def test_commands_for_an_empty_object(server: Server, command: str) -> None:
    assert await server.outcome(command, "empty") == ("done", None)
