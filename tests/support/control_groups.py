"""The control groups of this host, version 2."""

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import wait_until


def control_groups() -> Path:
    """Where version 2 of the control groups is mounted."""
    command = ["findmnt", "--noheadings", "--first-only", "--output=TARGET", "--types=cgroup2"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Freeze a process in a control group: it is in no state that tells that it does not run."""
    try:
        group = control_groups() / f"trimsfs-tests-{uuid.uuid4().hex}"
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
        (group / "cgroup.freeze").write_text("1")
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"no control group can be frozen here: {error}")
    try:
        yield
    finally:
        (group / "cgroup.freeze").write_text("0")
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
