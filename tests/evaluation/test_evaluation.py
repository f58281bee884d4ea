"""The evaluation itself, on two small models: it measures what it says, and outputs are equal from every place."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.evaluation.clients import draw
from tests.evaluation.results import IDEAL, NATIVE, PLACES, SHARED, Batch, p99_speedups, percentile
from tests.evaluation.setting import Model
from tests.support.frameworks import python_of

MODELS = ("squeezenet-1.1", "resnet18-v2")
SOME = [Model(name=f"model{n}", nbytes=1 << 20, input_shape=(1, 3, 8, 8), large=False) for n in range(20)]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.timeout(400)
def test_a_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.evaluation", python_of("mxnet"), "--quick"]
    done = subprocess.run(
        [*command, "--models", ",".join(MODELS), "--output", tmp_path],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == []
    seen = {(request["model"], request["place"]): request for request in results["requests"]}
    assert {*seen} == {(model, place) for model in MODELS for place in PLACES}
    for model in MODELS:
        assert len({seen[model, place]["answer"]["output"] for place in PLACES}) == 1
    assert {batch["way"] for batch in results["batches"]} == {NATIVE, SHARED, IDEAL}
    assert all(sum(map(len, batch["latencies"].values())) == 20 for batch in results["batches"])
    policies = {policy["name"]: policy for policy in results["policies"]}
    assert policies["lru"]["fetched"] <= policies["lru"]["asked"]
    assert [folding["model"] for folding in results["foldings"]] == ["squeezenet-1.1"]
    report = (tmp_path / "report.md").read_text()
    assert "End to end" in report
    assert (tmp_path / "speedup-small.svg").exists()


def test_requests_are_the_same_each_time_and_pareto() -> None:
    drawn = draw(SOME, 1.0, 2000)
    assert drawn == draw(SOME, 1.0, 2000)
    counts = sorted((drawn.count(model) for model in SOME), reverse=True)
    assert counts[0] > 2000 * 0.4
    assert counts[0] > 2 * counts[1] > 2 * counts[2] > 0
    assert len({model.name for model in draw(SOME, 0.1, 100)}) == 2


def batch(way: str, latencies: dict[str, Sequence[float]]) -> Batch:
    return Batch(way=way, share=1.0, clients=1, latencies={name: list(each) for name, each in latencies.items()})


def test_gains_are_means_over_models() -> None:
    native = batch(NATIVE, {"a": [1.0] * 98 + [8.0] * 2, "b": [2.0]})
    shared = batch(SHARED, {"a": [1.0] * 98 + [2.0] * 2, "b": [2.0]})
    assert p99_speedups(native, shared) == pytest.approx(2.0)
    assert p99_speedups(batch(NATIVE, {}), shared) is None
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
