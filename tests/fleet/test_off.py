"""What a fleet costs a mount that belongs to none."""

import re
from pathlib import Path

from tests.support.mounts import mounted

PROFILED = {"PYTHONPROFILEIMPORTTIME": "1"}
"""Has Python tell each module that it imports, on standard error: the server's log."""


def test_a_mount_of_no_fleet_imports_nothing_of_it(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "file").write_bytes(b"content")
    with mounted(store_directory, tmp_path, environment=PROFILED) as mount:
        assert (mount.path / "file").read_bytes() == b"content"
        imported = re.findall(r"import time:.*\| +(\S+)$", mount.log(), re.MULTILINE)
    assert "trimsfs.server.assembly" in imported
    assert [name for name in imported if name.startswith(("trimsfs.extras.fleet", "h11"))] == []
