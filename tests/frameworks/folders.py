"""Processes that infer with MXNet at once and fold: started, and asked what their weights take."""

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.frameworks import PROGRAMS
from tests.support.mounts import TRIMSFS


def start(stack: ExitStack, python: str, directory: Path, *, shared: bool, size: int = 224) -> "subprocess.Popen[str]":
    """A process of an interpreter that has MXNet, under ``trimsfs run`` or not, for images of *size* pixels a side."""
    command: list[str | Path] = [*([TRIMSFS, "run", "--"] if shared else []), python, "-W", "ignore"]
    process = subprocess.Popen(
        [*command, PROGRAMS / "mxnet_fold.py", directory, "--size", str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a core for each at most: all run at once
    )
    stack.callback(process.communicate)
    stack.callback(process.kill)
    return process


def told(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The next that a process tells. Raises RuntimeError when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process has ended that was to infer")
    answer: dict[str, Any] = json.loads(line)
    return answer


def ask(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a process's weights take now."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return told(process)
