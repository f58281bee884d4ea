"""Eight unmodified MXNet processes after ten inferences each: their weights cost one copy, and outputs are equal."""

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.test_frameworks import PROGRAMS, TIMEOUT_S, python_of
from tests.mounts import TRIMSFS, mounted
from trimsfs.client import pages

PROCESSES = 8
COPIES = 1.3
"""Most that the weights of all processes may cost."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def answers(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def ask(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return answers(process)


def start(stack: ExitStack, directory: Path, *, shared: bool) -> "subprocess.Popen[str]":
    runner = [TRIMSFS, "run", "--"] if shared else []
    command = [*runner, python_of("mxnet"), "-W", "ignore", PROGRAMS / "mxnet_fold.py", directory]
    # A core for each at most: all run at once.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    stack.callback(process.communicate)
    stack.callback(process.kill)
    return process


@pytest.mark.parametrize(
    "network",
    ["resnet50_v1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16", "mobilenet1.0", "densenet121"))],
)
@pytest.mark.timeout(900)
def test_eight_processes_have_one_copy_of_the_weights(tmp_path: Path, network: str) -> None:
    try:
        pages.own(0, 0)
    except OSError:
        pytest.skip("needs Linux 6.7")
    store = tmp_path / "store"
    build: list[str | Path] = [python_of("mxnet"), PROGRAMS / "mxnet_build.py", store / "net", "--model", network]
    subprocess.run(build, check=True, capture_output=True, timeout=TIMEOUT_S)
    weights_kib = (store / "net/params").stat().st_size / 1024
    with mounted(store, tmp_path) as mount, ExitStack() as stack:
        plain = start(stack, store / "net", shared=False)
        expected = answers(plain)["outputs"]
        processes = [start(stack, mount.path / "net", shared=True) for _ in range(PROCESSES)]
        told = [answers(process) for process in processes]
        taken = [ask(process) for process in processes]
        print(network, round(weights_kib), taken, told)
    assert [each["outputs"] for each in told] == [expected] * PROCESSES
    assert len(expected) == 1
    # The server maps what is open as well: its share is not in these sums, so they are a little less than all there is.
    assert sum(each["Anonymous"] for each in taken) < 0.3 * weights_kib
    assert sum(each["Pss"] for each in taken) < COPIES * weights_kib
