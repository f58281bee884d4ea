"""Fixtures of the tests of control files."""

import pytest

from tests.support.parts import content_of
from tests.support.stores import MemoryStore


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
