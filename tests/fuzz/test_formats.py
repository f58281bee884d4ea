"""Damaged model files are refused, and do nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.model_files import FILES

ROOT = Path(__file__).parents[2]


def fuzz(kind: str, count: int, timeout_s: float) -> None:
    command = [sys.executable, "-m", "tests.fuzz.formats", f"--only={kind}", f"--count={count}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    refused = int(done.stdout.split(": ")[1].split()[0])
    assert 0 < refused < count  # some of them are well still


@pytest.mark.parametrize("kind", FILES)
def test_a_few_damaged_files(kind: str) -> None:
    fuzz(kind, 20_000, timeout_s=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", FILES)
def test_a_million_damaged_files(kind: str) -> None:
    fuzz(kind, 1_000_000, timeout_s=1100)
