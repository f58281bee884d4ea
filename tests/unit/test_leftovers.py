"""A run of the tests tells what it has left, and ends it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.mounts import wait_until
from trimsfs.processes import exists

LEAVES = """
import subprocess
def test_it():
    process = subprocess.Popen(["sleep", "300"])
    open("pid", "w").write(str(process.pid))
"""
LEAVES_A_FILE = """
import tempfile
def test_it():
    open(tempfile.gettempdir() + "/trimsfs-tests-1", "w")
"""


def run(directory: Path, content: str) -> "subprocess.CompletedProcess[str]":
    """Run a test in a directory, which is also that of temporary files."""
    (directory / "test_it.py").write_text(content)
    program = (
        f"import pytest, sys; import tests.support.leftovers as plugin; plugin.END_TIMEOUT_S = 0.5; "
        f"sys.exit(pytest.main(['-p', 'no:cacheprovider', '-c', '/dev/null', '--rootdir', '.', "
        f"'--basetemp', '{directory / 'base'}', 'test_it.py'], plugins=[plugin]))"
    )
    root = str(Path(leftovers.__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("content", [LEAVES, LEAVES.replace("300", "0")], ids=["left", "ended"])
def test_a_process_that_is_left_makes_a_run_fail_and_is_ended(tmp_path: Path, content: str) -> None:
    done = run(tmp_path, content)
    pid = int((tmp_path / "pid").read_text())
    left = "300" in content
    assert (f"process {pid}: sleep 300" in done.stdout) == left, done.stdout + done.stderr
    assert done.returncode == int(left)
    wait_until(lambda: not exists(pid))


def test_what_a_run_shares_goes_with_it(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import os
        from tests.support.shared_by_run import MARK, shared_by_run
        def test_it():
            directory = shared_by_run(os.environ[MARK])
            directory.mkdir()
            (directory / "library").touch()
            open("directory", "w").write(str(directory))
        """.replace("\n        ", "\n"),
    )
    assert done.returncode == 0, done.stdout
    assert not Path((tmp_path / "directory").read_text()).exists()


def test_a_temporary_file_that_is_left_makes_a_run_fail(tmp_path: Path) -> None:
    done = run(tmp_path, LEAVES_A_FILE)
    assert f"temporary file {tmp_path / 'trimsfs-tests-1'}" in done.stdout
    assert done.returncode == 1
