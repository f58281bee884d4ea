"""Fixtures of the tests of integrity."""

from functools import partial
from pathlib import Path

import pytest

from tests.support.parts import content_of
from tests.support.served import FakeBacking, Serving, served
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import CHUNKS


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at or tried from time to time is soon looked at or tried again; the store is waited for."""
    monkeypatch.setattr("trimsfs.integrity.integrity.PATIENCE_S", 20)
    for name in ("quarantine.LOOK", "integrity.RETRY", "deferred.RETRY"):
        monkeypatch.setattr(f"trimsfs.integrity.{name}_INTERVAL_S", 0.2)


@pytest.fixture
def content(chunk_size: int) -> bytes:
    return content_of("a", CHUNKS * chunk_size - 100)


@pytest.fixture
def store(content: bytes, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A model that is too large for any digest to be computed at once."""
    monkeypatch.setattr("trimsfs.integrity.integrity.SMALL", 1000)
    for most in ("SMALL", "TINY"):
        monkeypatch.setattr(f"trimsfs.integrity.digest_comparison.{most}", 1000)
    return MemoryStore({"a": content, "b": content_of("b", len(content)), "small": content[:1000], "empty": b""})


@pytest.fixture
def serving(store: MemoryStore, tmp_path: Path, chunk_size: int) -> Serving:
    return partial(
        served,
        store,
        tmp_path / "cache",
        chunk_size=chunk_size,
        backing=FakeBacking(),
        cold_open="wait",
        retry_deadline=0.1,
    )
