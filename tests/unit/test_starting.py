"""A server that starts while the index fails for a moment."""

import sqlite3

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
