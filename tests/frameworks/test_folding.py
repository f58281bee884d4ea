"""Eight unmodified MXNet processes after ten inferences each: their weights cost one copy, and outputs are equal."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.frameworks import PROGRAMS
from tests.frameworks.folders import ask, start, told
from tests.support.frameworks import ROOT, TIMEOUT_S, python_of, run_mxnet
from tests.support.mounts import TRIMSFS, mounted
from trimsfs.client import pages

PROCESSES = 8
COPIES = 1.3
"""Most that the weights of all processes may cost."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.parametrize(
    "network",
    ["mobilenet1.0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16", "resnet50_v1", "densenet121"))],
)
@pytest.mark.timeout(900)
def test_eight_processes_have_one_copy_of_the_weights(tmp_path: Path, network: str) -> None:
    try:
        pages.own(0, 0)
    except OSError:
        pytest.skip("needs Linux 6.7")
    store = tmp_path / "store"
    python = python_of("mxnet")
    build: list[str | Path] = [python, PROGRAMS / "mxnet_build.py", store / "net", "--model", network]
    subprocess.run(build, check=True, capture_output=True, timeout=TIMEOUT_S)
    weights_kib = (store / "net/params").stat().st_size / 1024
    with mounted(store, tmp_path) as mount, ExitStack() as stack:
        plain = start(stack, python, store / "net", shared=False)
        expected = told(plain)["outputs"]
        processes = [start(stack, python, mount.path / "net", shared=True) for _ in range(PROCESSES)]
        reports = [told(process) for process in processes]
        taken = [ask(process) for process in processes]
        print(network, round(weights_kib), taken, reports)
    assert [each["outputs"] for each in reports] == [expected] * PROCESSES
    assert len(expected) == 1
    # The server maps what is open as well: its share is not in these sums, so they are a little less than all there is.
    assert sum(each["Anonymous"] for each in taken) < 0.3 * weights_kib
    assert sum(each["Pss"] for each in taken) < COPIES * weights_kib


SLOW = """
#include <string.h>
#include <unistd.h>
static int slow_memcmp(const void *one, const void *other, size_t size)
{
	int result = memcmp(one, other, size);

	usleep(20000);
	return result;
}
#define memcmp slow_memcmp
"""


@pytest.mark.slow
def test_no_write_is_lost(tmp_path: Path) -> None:
    """Were it possible to write between the comparing and the mapping, it would happen: there are 20 ms between."""
    (tmp_path / "slow.h").write_text(SLOW)
    library = tmp_path / "slow.so"
    source = ROOT / "trimsfs/client/_fold.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-include", tmp_path / "slow.h", source, "-o", library], check=True)
    store = tmp_path / "store"
    store.mkdir()
    python, program = python_of("mxnet"), PROGRAMS / "mxnet_fold_writes.py"
    run: list[str | Path] = [TRIMSFS, "run", "--", python, "-W", "ignore", program]
    subprocess.run([*run, store / "params", "--build"], check=True, timeout=TIMEOUT_S)
    with mounted(store, tmp_path) as mount:
        arguments = (mount.path / "params", "--library", library, "--scratch", tmp_path)
        report = run_mxnet("mxnet_fold_writes", *arguments, shared=True)
    print(report)
    assert len(report) == 7
    assert {way: counts["wrong"] for way, counts in report.items()} == dict.fromkeys(report, 0)
    assert all(counts["folds"] and counts["writes"] > 10 for counts in report.values())


@pytest.mark.slow
def test_programs_go_on_as_they_would(tmp_path: Path) -> None:
    """Errors are told, nothing waits for what waits for it, outputs are right, and what is in training stays here."""
    store = tmp_path / "store"
    store.mkdir()
    run: list[str | Path] = [TRIMSFS, "run", "--", python_of("mxnet"), PROGRAMS / "mxnet_fold_trouble.py"]
    subprocess.run([*run, store, "--build"], check=True, timeout=TIMEOUT_S)
    with mounted(store, tmp_path) as mount:
        report = run_mxnet("mxnet_fold_trouble", mount.path, shared=True)
    print(report)
    told_failures, untold = report["failures told and not told"]
    assert (told_failures > 10, untold, report["wrong"]) == (True, 0, 0)
    assert (report["passed on in training"], report["passed on after it"]) == (False, True)
    assert min(report["trained"], report["operators in Python"], report["with finalizers"]) > 10
    assert max(report["longest_s"], report["longest with finalizers_s"]) < 2.5  # nothing waited for its end


@pytest.mark.parametrize(
    ("seconds", "fused"),
    [
        pytest.param(10, False, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(300, False, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_two_threads_load_modules_that_are_folded_all_the_time(seconds: int, fused: bool, tmp_path: Path) -> None:
    """Nothing hangs or goes wrong, and the program ends as it should, with arrays being dropped to the last."""
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run([python_of("mxnet"), PROGRAMS / "mxnet_end.py", store, "build"], check=True, timeout=TIMEOUT_S)
    with mounted(store, tmp_path) as mount:
        report = run_mxnet(
            "mxnet_fold_stress",
            *(mount.path, "--seconds", str(seconds)),
            shared=True,
            environment={"MXNET_SUBGRAPH_BACKEND": "MKLDNN" if fused else "NONE"},
            timeout_s=seconds + TIMEOUT_S,
        )
    print(report)
    assert report["folded"] is not fused  # what fused operators use they do not write to
    assert report["wrong"] == [0, 0]
    assert min(report["loaded"]) > 3
