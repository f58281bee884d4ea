"""The networks of the paper: as large as it says, written as MXNet would, and computing something."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.frameworks import python_of

EVALUATION = Path(__file__).parent
TIMEOUT_S = 60
MIB = 2**20
WRITTEN = ("squeezenet-1.1", "resnet18-v2", "googlenet")
AGAIN = """
import sys
from pathlib import Path
import mxnet, zoo
params, directory, saved = sys.argv[1:]
zoo.write_model("squeezenet-1.0", Path(directory))  # what is written before changes nothing
zoo.write_model("squeezenet-1.1", Path(directory))
mxnet.nd.save(saved, mxnet.nd.load(params))
"""


def run(*arguments: str | Path) -> list[str]:
    """Lines that MXNet's Python prints, with the zoo on its path."""
    done = subprocess.run(
        [python_of("mxnet"), *arguments],
        env={**os.environ, "PYTHONPATH": str(EVALUATION)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def listed() -> dict[str, Any]:
    entries = [json.loads(line) for line in run("-m", "zoo", "--list")]
    return {entry["name"]: entry for entry in entries}


def test_networks_have_the_papers_sizes(listed: dict[str, Any]) -> None:
    assert [entry["large"] for entry in listed.values()] == [False] * 37 + [True] * 8
    for name, entry in listed.items():
        assert entry["bytes"] / MIB == pytest.approx(entry["paper_mb"], rel=0.02), name


@pytest.mark.parametrize("name", [WRITTEN[0], *(pytest.param(name, marks=pytest.mark.slow) for name in WRITTEN[1:])])
def test_network_is_written_whole_and_infers(listed: dict[str, Any], name: str, tmp_path: Path) -> None:
    written = json.loads(run("-m", "zoo", name, tmp_path)[-1])
    inferred = json.loads(run("-m", "zoo.infer", name, tmp_path)[-1])

    assert sorted(path.name for path in tmp_path.iterdir()) == ["params", "symbol.json"]
    assert written == {"name": name, "bytes": (tmp_path / "params").stat().st_size}
    assert inferred["numbers"] * 4 == listed[name]["bytes"] < written["bytes"]
    assert inferred["classes"] == listed[name]["classes"]
    assert inferred["finite"]
    assert inferred["sum"] == pytest.approx(1, abs=1e-4)
    assert inferred["least"] * 1.5 < inferred["most"] < 0.9  # neither uniform nor certain
    assert inferred["changed"] > 1e-3  # by another image


def test_params_are_always_the_same_and_as_mxnet_saves_them(tmp_path: Path) -> None:
    one, other, saved = tmp_path / "one", tmp_path / "other", tmp_path / "saved"
    run("-m", "zoo", "squeezenet-1.1", one)
    run("-c", AGAIN, one / "params", other, saved)

    assert (one / "params").read_bytes() == saved.read_bytes()
    for name in ("params", "symbol.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
