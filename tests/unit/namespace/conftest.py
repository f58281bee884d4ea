"""Fixtures of the tests of the namespace."""

import pytest

from tests.support.stores import MemoryStore
from trimsfs.stores.base import PAGE_LIMIT


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"a": b"content of a", "b": b"content of b", "dir/c": b"content of c"})


@pytest.fixture
def large_store() -> MemoryStore:
    """A store with one directory more than a page can hold."""
    return MemoryStore({f"large/{number:06}": b"%d" % number for number in range(PAGE_LIMIT + 1)})
