"""Fixtures of the tests of control files."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from tests.fakes import MemoryStore
from tests.unit.control.common import Serving
from tests.unit.parts import content_of
from tests.unit.served import Server, served


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
