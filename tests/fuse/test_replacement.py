"""A model of several files that is replaced in the store, on a real mount that believes names for a long time."""

import os
from pathlib import Path

from tests.support.mounts import mounted

SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def publish(directory: Path, content: bytes) -> None:
    """Put a version of the model into the store."""
    directory.mkdir(exist_ok=True)
    for shard in SHARDS:
        (directory / "new").write_bytes(content)
        (directory / "new").replace(directory / shard)


def test_one_file_that_was_replaced_has_its_siblings_looked_up_anew(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    publish(store / "model", b"old" * 1000)
    with mounted(store, tmp_path, "--metadata-ttl", "600", "--prefetch", "off") as mount:
        first, second, third = (mount.path / "model" / shard for shard in SHARDS)
        with first.open("rb") as before:
            assert second.read_bytes() == b"old" * 1000
            assert os.getxattr(before.fileno(), "user.trims.replaced") == b"false"
            publish(store / "model", b"new" * 1000)
            assert second.read_bytes() == b"old" * 1000
            assert third.read_bytes() == b"new" * 1000  # which was not here, and cannot be had of the old version
            assert [file.read_bytes() for file in (first, second)] == [b"new" * 1000] * 2
            assert before.read() == b"old" * 1000
            assert os.getxattr(before.fileno(), "user.trims.replaced") == b"true"
            assert os.getxattr(first, "user.trims.replaced") == b"false"
        assert "/model/: files have been replaced in the store while programs have 1 of them open" in mount.log()
        assert "trimsfs_files_replaced_while_open_total 1.0" in (mount.path / ".trims/metrics").read_text()
