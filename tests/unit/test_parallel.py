"""Tests in several processes: what is marked ``alone`` runs last, and beside no other test."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = """
import os, time
from pathlib import Path
import pytest

def note(kind):
    began = time.monotonic()
    time.sleep(0.2)
    line = f"{kind} {os.getpid()} {began} {time.monotonic()}\\n"
    with Path(__file__).with_name("notes").open("a") as file:
        file.write(line)

@pytest.mark.alone
@pytest.mark.parametrize("number", range(2))
def test_alone(number):
    note("alone")

@pytest.mark.parametrize("number", range(4))
def test_together(number):
    note("together")
"""


def test_a_test_that_is_alone_runs_last_and_beside_no_other(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(FILE)
    command: list[str | Path] = [sys.executable, "-m", "pytest", "-n", "2", "-p", "tests.support.parallel", tmp_path]
    command += [f"--basetemp={tmp_path / 'temporary'}"]  # not that of these tests, which it would close to servers
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    lines = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    times = {
        kind: sorted((float(line[2]), float(line[3])) for line in lines if line[0] == kind)
        for kind in ("alone", "together")
    }
    assert (len(times["alone"]), len(times["together"])) == (4, 8)
    assert len({line[1] for line in lines if line[0] == "together"}) == 2
    ends = [max(end for _, end in times["together"]), *(end for _, end in times["alone"])]
    assert all(end <= began for end, (began, _) in zip(ends, times["alone"], strict=False))
