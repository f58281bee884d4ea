"""Fixtures of the tests of signed files."""

from functools import partial
from pathlib import Path

import pytest

from tests.support.parts import content_of
from tests.support.served import FakeBacking, Serving, served
from tests.support.signing import sign
from tests.support.stores import MemoryStore
from tests.unit.signature_policy.common import KEY, Scene
from trimsfs.extras.signatures.signed_manifest import read_manifest


@pytest.fixture
def files(chunk_size: int) -> dict[str, bytes]:
    return {"params": content_of("p", 3 * chunk_size + 5), "deep/shard": content_of("s", 10), "empty": b""}


@pytest.fixture
def store(files: dict[str, bytes]) -> MemoryStore:
    """A signed model, and one that is not."""
    signed = {f"signed/{name}": content for name, content in files.items()}
    other = {f"other/{name}": content for name, content in files.items()}
    return MemoryStore({**signed, **other, "signed/model.sig": sign(KEY, files)})


@pytest.fixture
def serving(store: MemoryStore, tmp_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> Serving:
    monkeypatch.setattr("trimsfs.integrity.integrity.PATIENCE_S", 20)
    monkeypatch.setattr("trimsfs.integrity.deferred.RETRY_INTERVAL_S", 0.1)
    for most in ("SMALL", "TINY"):  # a test holds the copier's digests back
        monkeypatch.setattr(f"trimsfs.integrity.digest_comparison.{most}", 1000)
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.1)
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    return partial(
        served,
        store,
        tmp_path / "cache",
        chunk_size=chunk_size,
        backing=FakeBacking(),
        read_manifest=partial(read_manifest, key=KEY.public_key()),
        signatures="require",
        metadata_ttl=0.0,
        retry_deadline=0.1,
    )


@pytest.fixture
def scene(store: MemoryStore, files: dict[str, bytes], chunk_size: int, tmp_path: Path, serving: Serving) -> Scene:
    return Scene(store, files, chunk_size, tmp_path / "cache", serving)
