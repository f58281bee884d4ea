"""Fixtures of the tests of integrity."""

from functools import partial
from pathlib import Path

import pytest

from tests.support.held import Held
from tests.support.parts import content_of
from tests.support.served import FakeBacking, Serving, served
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import CHUNKS, Scene
from trimsfs.fetch.processes import thread_copier


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at or tried from time to time is soon looked at or tried again; the store is waited for."""
    monkeypatch.setattr("trimsfs.integrity.integrity.PATIENCE_S", 20)
    for name in ("quarantine.LOOK", "deferred.RETRY", "scrub.LOOK"):
        monkeypatch.setattr(f"trimsfs.integrity.{name}_INTERVAL_S", 0.05)


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


@pytest.fixture
def scene(store: MemoryStore, content: bytes, chunk_size: int, tmp_path: Path, serving: Serving) -> Scene:
    return Scene(store, content, chunk_size, tmp_path / "cache", serving)


@pytest.fixture
def digesting(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Holds the first digest up before it is computed."""
    return Held(monkeypatch, thread_copier, "compute", times=1)
