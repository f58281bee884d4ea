"""What a server gives to the user that it will become."""

import os
from pathlib import Path
from typing import Any

import pytest

from trimsfs.server.sandbox import Identity, give

THEM = Identity(name="them", uid=60_001, gid=60_001)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("vanishing", ["index.sqlite-wal", "blobs/aa/one", "blobs/aa"])
def test_a_cache_is_given_though_another_server_removes_files_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vanishing: str
) -> None:
    cache = tmp_path / "cache"
    (cache / "blobs/aa").mkdir(parents=True)
    for name in ("index.sqlite", "index.sqlite-wal", "blobs/aa/one", "blobs/aa/other"):
        (cache / name).touch()
    chown = os.chown

    def removed_before(path: Any, *arguments: Any, **named: Any) -> None:
        if os.path.basename(path) == os.path.basename(vanishing):
            os.rename(cache / vanishing, tmp_path / "gone")
        chown(path, *arguments, **named)

    monkeypatch.setattr(os, "chown", removed_before)
    give(cache, THEM)
    assert {path.stat().st_uid for path in (cache, *cache.rglob("*"))} == {THEM.uid}
