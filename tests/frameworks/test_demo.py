"""`make demo`, the first thing that a user runs."""

import subprocess
import sys
from pathlib import Path

from tests.support.frameworks import ROOT, python_of
from trimsfs.mountinfo import mounts
from trimsfs.options import default_store


def test_the_demo_shows_that_processes_share() -> None:
    there = Path(default_store(), "resnet50").exists()
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo", python_of("mxnet")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "Outputs are equal" in done.stdout
    assert not [mount for mount in mounts() if "trimsfs-demo-" in str(mount.mountpoint)]
    if not there:
        for file in Path(default_store(), "resnet50").iterdir():
            file.unlink()
        Path(default_store(), "resnet50").rmdir()
