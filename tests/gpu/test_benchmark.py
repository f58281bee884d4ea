"""The benchmark of a card, where there is none: that it refuses, and that it works on emulated devices."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.benchmarks.gpu.load import OTHERS
from tests.benchmarks.gpu.report import WARNING
from tests.cuda import KernelDriver, environment
from tests.gpu.mount import ROOT

GROUPS = {"first", "fill", "fetch", "load", "memory"}


def bench(
    *arguments: str | Path, variables: Mapping[str, str] | None = None, timeout_s: float = 60
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", *arguments],
        cwd=ROOT,
        env=os.environ | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_it_refuses_without_a_card(arguments: list[str]) -> None:
    done = bench(*arguments, variables={"CUDA_VISIBLE_DEVICES": ""})

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("no card to measure: ")


def test_it_sees_a_device(tmp_path: Path) -> None:
    with KernelDriver(tmp_path, [1 << 20]) as kernel:
        done = bench("--check", variables=environment(kernel))

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.slow
def test_all_of_it_works_on_an_emulated_device(tmp_path: Path) -> None:
    done = bench("--emulated", "--output", tmp_path, timeout_s=200)

    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["warning"], results["failures"], results["skipped"]) == (WARNING, [], [])
    assert {series["group"] for series in results["series"]} == GROUPS
    for series in results["series"]:
        assert series["samples"] or series["note"], series
        assert series["samples"] or series["contender"].startswith(tuple(other.name for other in OTHERS)), series
    loaded = {series["contender"] for series in results["series"] if series["group"] == "load"}
    assert loaded >= {f"{other.name}, {place}" for other in OTHERS for place in ("local file", "from the mount")}
    report = (tmp_path / "report.md").read_text()
    headings = [line for line in report.splitlines() if line.startswith("### ")]
    assert len(headings) == len(GROUPS)
    assert all(WARNING in heading for heading in headings)
