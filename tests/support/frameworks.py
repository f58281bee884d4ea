"""Programs in the environments of frameworks, and what they report."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks import PROGRAMS
from tests.support.mounts import TRIMSFS

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
NOT_FOR_NUMPY = {"model.gguf"}
"""Files that NumPy has no types for."""


def python_of(framework: str) -> str:
    """The interpreter that has a framework: one of the environments that the Makefile makes."""
    default = ROOT / (".venv-mxnet" if framework == "mxnet" else ".venv-frameworks")
    python = Path(os.environ.get(f"TEST_{default.name[6:].upper()}", default)) / "bin/python"
    if framework == "mxnet" and not python.exists():
        pytest.skip("MXNet 1.9 needs Python 3.11 or older, which is not here")
    return str(python)


def run_mxnet(
    program: str,
    *arguments: str | Path,
    shared: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """What a program of MXNet's reports, under ``trimsfs run`` or not."""
    runner = [TRIMSFS, "run", "--"] if shared else []
    command = [*runner, python_of("mxnet"), PROGRAMS / f"{program}.py", *arguments]
    return report_of(command, environment, timeout_s)


def report_of(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """What a program reports in its last line."""
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def program(name: str, framework: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a program with the client at hand; the files it reports."""
    command = [python_of(framework), PROGRAMS / f"{name}.py", *arguments]
    files: dict[str, Any] = report_of(command, {"PYTHONPATH": str(ROOT)})["files"]
    return files
