"""Fixtures of the tests of the namespace."""

import pytest

from tests.support.stores import MemoryStore
from tests.unit.namespace.processes import Processes
from trimsfs.namespace import alias_targets
from trimsfs.processes import Process
from trimsfs.stores.base import PAGE_LIMIT


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"a": b"content of a", "b": b"content of b", "dir/c": b"content of c"})


@pytest.fixture
def large_store() -> MemoryStore:
    """A store with one directory more than a page can hold."""
    return MemoryStore({f"large/{number:06}": b"%d" % number for number in range(PAGE_LIMIT + 1)})


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    """A table in place of the one in /proc. Thread 1000 * N + M belongs to process N."""
    processes = Processes()
    monkeypatch.setattr(alias_targets, "lineage", processes.lineage)
    monkeypatch.setattr(alias_targets, "container_of", processes.container_of)
    monkeypatch.setattr(alias_targets, "process_of", lambda thread: thread // 1000 or thread)
    monkeypatch.setattr(Process, "runs", property(processes.runs))
    return processes
