"""What weights take in several processes together, of each family of networks, once they have inferred some times."""

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.evaluation.results import Folding, Results
from tests.evaluation.setting import Model, Setting
from tests.frameworks.test_frameworks import PROGRAMS
from tests.mounts import TRIMSFS

FAMILIES = (
    *("alexnet", "googlenet", "dpn68", "inception-v3", "inception-v4", "inceptionbn-v3", "inception-resnet-v2", "nin"),
    *("resnet50", "resnet50-v2", "resnext50-32x4d", "squeezenet-1.1", "vgg16", "wrn50-2", "xception"),
)
"""One network of each."""


def folding(setting: Setting, models: Sequence[Model], results: Results, *, processes: int) -> None:
    """Have processes infer at once, and then sum up what their weights take."""
    for model in (model for model in models if model.name in FAMILIES):
        setting.write(model)
        with setting.mounted() as mount, ExitStack() as stack:
            running = [_start(setting, stack, mount.path / model.name, model) for _ in range(processes)]
            told = [_line(process) for process in running]
            taken = [_ask(process) for process in running]
        if len({output for each in told for output in each["outputs"]}) > 1:
            results.failures.append(f"{model.name}: outputs differ between processes that share weights")
        result = Folding(
            model=model.name,
            processes=processes,
            nbytes=model.nbytes,
            own=sum(each["own_kib"] for each in told) << 10,
            own_folded=sum(each["Anonymous"] for each in taken) << 10,
            all_folded=sum(each["Pss"] for each in taken) << 10,
            before_s=sum(each["before_s"] for each in told) / processes,
            after_s=sum(each["after_s"] for each in told) / processes,
        )
        results.foldings.append(result)
        setting.console.print(f"[dim]{model.name}: {result.copies:.2f} copies[/dim]", highlight=False)


def _start(setting: Setting, stack: ExitStack, directory: Path, model: Model) -> "subprocess.Popen[str]":
    program, size = PROGRAMS / "mxnet_fold.py", model.input_shape[-1]
    process = subprocess.Popen(
        [TRIMSFS, "run", "--", setting.python, "-W", "ignore", program, directory, "--size", str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    stack.callback(process.communicate)
    stack.callback(process.kill)
    return process


def _ask(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return _line(process)


def _line(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process has ended that was to infer")
    told: dict[str, Any] = json.loads(line)
    return told
