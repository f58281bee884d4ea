"""How a server's process begins and ends."""

import sqlite3
import subprocess
import sys

import pytest
import trio

from tests.support.served import Serving
from tests.support.stores import MemoryStore
from trimsfs.tiers.index.index import BlobIndex


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"a": b"content"})


async def test_an_index_that_cannot_be_read_for_a_moment_at_the_start_ends_no_server(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = BlobIndex.records, list[bool]()

    def records(self: BlobIndex, store: str) -> object:
        if not failed:
            failed.append(True)
            raise sqlite3.OperationalError("disk I/O error")
        return real(self, store)

    monkeypatch.setattr(BlobIndex, "records", records)
    async with serving() as server:
        await trio.sleep(0.2)
        assert await server.content("a") == b"content"
    assert failed


def test_what_a_server_knows_goes_with_its_process_and_is_not_taken_apart() -> None:
    """Of a million names that takes seconds, and who unmounts waits."""
    code = """
import atexit, runpy
from trimsfs.server import startup
startup.main = lambda: atexit.register(print, "took it apart")
runpy.run_module("trimsfs.daemon", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
