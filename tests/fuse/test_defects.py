"""Defects of trimsfs: they are not the store's, a reader gets EIO, and the log tells where they are."""

import errno
import os
import time
from pathlib import Path

import pytest

from tests.services.fast import start_fast
from tests.support import defective
from tests.support.keepers import have_serve
from tests.support.mounts import mounted


def test_a_defect_is_an_error_for_its_caller_alone_and_is_in_the_log(tmp_path: Path) -> None:
    models = tmp_path / "buckets/bucket/models"
    models.mkdir(parents=True)
    (models / "weights").write_bytes(b"weights")
    (models.parent / "unlisted").mkdir()
    (models.parent / "unlisted/file").touch()
    with (
        start_fast(tmp_path / "buckets") as server,
        mounted("s3://bucket", tmp_path / "mount", environment=server.environment()) as mount,
    ):
        have_serve(defective, mount, "s3://bucket")
        pid, began = mount.control()["server_pid"], time.monotonic()
        for act in ((mount.path / "models/weights").read_bytes, lambda: os.listdir(mount.path / "unlisted")):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                act()
        assert time.monotonic() - began < 12  # no retries, which go on for 15 s
        assert os.listdir(mount.path / "models") == ["weights"]
        assert mount.control()["server_pid"] == pid
        log = mount.log()
    for defect in ("TypeError: a defect of a sink", "LookupError: a defect of a store"):
        assert "Traceback (most recent call last):" in log
        assert defect in log
    assert "ERROR" in log
    assert "the answer is not from S3" not in log
