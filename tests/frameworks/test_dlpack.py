"""Frameworks take the capsules that tensors in a device's memory are lent by. Here these are of the host's memory."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks import PROGRAMS
from tests.frameworks.test_frameworks import ROOT, TIMEOUT_S, python_of


def takes(python: str) -> dict[str, Any]:
    """What becomes of the capsules that each framework of an interpreter takes."""
    command = [python, str(PROGRAMS / "dlpack_take.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    frameworks: dict[str, Any] = json.loads(done.stdout)["frameworks"]
    return frameworks


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_what_is_taken_is_right_and_kept_for_as_long_as_it_is_used(framework: str) -> None:
    heavy = str(Path(os.environ.get("TEST_HEAVY", ROOT / ".venv-heavy")) / "bin/python")
    found = takes(heavy if framework == "jax" else python_of("others"))
    assert found[framework] == {"right": True, "kept": True, "freed": True, "in an exception": "must be real number"}
