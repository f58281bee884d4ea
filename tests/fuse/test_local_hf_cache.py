"""A local Hugging Face cache, mounted as the cache of programs."""

import os
from pathlib import Path

from tests.support.hf_cache import REPOSITORY, commit_of, download, snapshot
from tests.support.mounts import mounted

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(3 << 20), "onnx/model.onnx": b"onnx" * 999}


def test_programs_find_a_model_offline_in_a_mounted_cache(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    download(cache, FILES)
    with mounted(cache, tmp_path / "mount") as mount:
        found = snapshot(mount.path, {"HF_HUB_OFFLINE": "1"})
        assert found == mount.path / REPOSITORY / "snapshots" / commit_of(FILES)
        assert {name: (found / name).read_bytes() for name in FILES} == FILES
        fetched = mount.metrics()["trimsfs_fetch_fetched_bytes_total"]
        for blob in (mount.path / REPOSITORY / "blobs").iterdir():
            assert blob.read_bytes() in FILES.values()
        assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == fetched, "a blob is fetched again by its name"
