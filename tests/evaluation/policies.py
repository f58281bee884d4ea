"""Eviction policies under a budget of half of the models' bytes: what each keeps, and what its misses cost."""

import time
from collections.abc import Sequence

from tests.benchmarks.data import heat
from tests.evaluation.clients import draw
from tests.evaluation.results import Policy, Results
from tests.evaluation.setting import BUCKET, Model, Setting
from trimsfs.eviction_policies import POLICIES


def policies(setting: Setting, models: Sequence[Model], results: Results, *, requests: int) -> None:
    """Read the same models in the same order over a mount of each policy. A request is a read of all of a file."""
    for model in models:
        setting.write(model)
    budget = sum(model.nbytes for model in models) // 2
    drawn = [model for model in draw(models, 1.0, requests) if model.nbytes <= budget]
    for name in POLICIES:
        with setting.mounted("--cache-size", str(budget), "--eviction", f"disk={name}") as mount:
            setting.server.reset()
            taken = []
            for model in drawn:
                began = time.perf_counter()
                heat(mount.path / model.name / "params")
                taken.append(time.perf_counter() - began)
            fetched = sum(
                traffic.body_bytes
                for key, traffic in setting.server.statistics().items()
                if key.startswith(f"{BUCKET}/") and key.endswith("/params")
            )
        asked = sum(model.nbytes for model in drawn)
        results.policies.append(Policy(name=name, mean_s=sum(taken) / len(taken), fetched=fetched, asked=asked))
        setting.console.print(f"[dim]{name}: fetched {fetched / asked:.0%} of what was read[/dim]", highlight=False)
