"""How much of a model processes share, by how they load it by its path: what docs/frameworks.md says of it is so."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import trimsfs
from tests.frameworks import PROGRAMS
from tests.support.frameworks import NOT_FOR_NUMPY, ROOT, TIMEOUT_S, program, python_of
from tests.support.mounts import MountedStore, mounted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MODEL_MB = 100.7
WAYS = {
    "torch mmap": "`torch.load(path, mmap=True)`",
    "torch": "`torch.load(path)`",
    "safetensors torch": "`safetensors.torch.load_file(path)`",
    "safetensors numpy": '`safetensors.safe_open(path, "np")`',
    "numpy mmap": '`numpy.load(path, mmap_mode="r")`',
    "numpy": "`numpy.load(path)`",
    "onnxruntime not packed": "`InferenceSession(path)`, external data, `session.disable_prepacking`",
    "onnxruntime beside": "`InferenceSession(path)`, external data",
    "onnxruntime inside": "`InferenceSession(path)`, weights in the model",
    "client numpy": "`trimsfs.open(path).numpy()`",
    "client torch": "`trimsfs.open(path).torch()`",
    "client mxnet": "`trimsfs.open(path).mxnet()`",
}
HEAVY_WAYS = {
    "client jax": "`trimsfs.open(path).jax()`, aligned",
    "client jax unaligned": "`trimsfs.open(path).jax()`, not aligned",
    "safetensors flax": "`safetensors.flax.load_file(path)`",
    "client tensorflow": "`trimsfs.open(path).tensorflow()`, aligned",
    "client tensorflow unaligned": "`trimsfs.open(path).tensorflow()`, not aligned",
    "tensorflow constant": "`tf.constant(trimsfs.open(path).numpy()[name])`",
}
"""What the program calls a way, and what the documentation does; the heavy have an environment of their own."""
FLOATS_OF_8_BITS = ("float8_e4m3fn", "float8_e5m2")


def interpreter(way: str) -> str:
    """The one that has the framework of a way."""
    if way in HEAVY_WAYS:
        return str(Path(os.environ.get("TEST_HEAVY", ROOT / ".venv-heavy")) / "bin/python")
    return python_of("mxnet" if "mxnet" in way else "others")


def environment() -> dict[str, str]:
    """With the client at hand."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, MountedStore]]:
    """A directory with the models, and the same on a mount."""
    scratch = tmp_path_factory.mktemp("sharing")
    local = scratch / "store"
    build = [python_of("others"), str(PROGRAMS / "sharing_build.py"), str(local)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
    with mounted(local, scratch) as mount:
        yield local, mount


def documented() -> dict[str, tuple[float, float]]:
    """What the documentation says that each way shares and copies, as parts of the model."""
    rows = re.findall(r"^\| (`.+) \| (\d+) \| (\d+) \|$", (ROOT / "docs/frameworks.md").read_text(), re.MULTILINE)
    return {way: (int(shared) / MODEL_MB, int(copied) / MODEL_MB) for way, shared, copied in rows}


def load_at_once(way: str, directories: list[Path]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What processes, one for each directory, compute, and what they find shared while all of them are there."""
    with ExitStack() as stack:
        processes = []
        for directory in directories:
            process = stack.enter_context(
                subprocess.Popen(
                    [interpreter(way), PROGRAMS / "sharing_load.py", way, directory],
                    env=environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            processes.append(process)
        computed = [_answer(process) for process in processes]
        assert [_answer(process, "\n") for process in processes] == computed
        return [(output, _answer(process, "\n")) for output, process in zip(computed, processes, strict=True)]


def _answer(process: "subprocess.Popen[str]", request: str = "") -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, "the program has failed"
    answer: dict[str, Any] = json.loads(line)
    return answer


def test_the_client_is_imported_when_it_is_used() -> None:
    script = "import sys, trimsfs; before = 'trimsfs.client' in sys.modules; print(before, trimsfs.open.__module__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout == "False trimsfs.client\n"


def test_every_way_that_is_documented_is_tested() -> None:
    assert documented().keys() == {*WAYS.values(), *HEAVY_WAYS.values()}


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in HEAVY_WAYS)])
def test_it_shares_what_is_documented(models: tuple[Path, MountedStore], way: str) -> None:
    local, mount = models
    shared, copied = documented()[(WAYS | HEAVY_WAYS)[way]]
    (expected, _), *on_mount = load_at_once(way, [local, mount.path, mount.path])
    print(way, *(measured for _, measured in on_mount))
    assert expected["spread"] > 0.1
    for output, measured in on_mount:
        assert output == expected
        assert measured["shared"] == pytest.approx(shared, abs=0.1)
        assert measured["pss"] < shared / 2 + 0.1  # the server maps what is open, too
        # How much more than all is copied depends on what an allocator keeps.
        assert min(measured["copied"], 1) == pytest.approx(min(copied, 1), abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["jax", "tensorflow"])
def test_aligned_tensors_lie_in_the_file(tmp_path: Path, library: str) -> None:
    facts = program("formats_write", "others", tmp_path)
    paths = [tmp_path / name for name in facts if name not in NOT_FOR_NUMPY]
    done = subprocess.run(
        [interpreter(f"client {library}"), PROGRAMS / "sharing_addresses.py", library, *paths],
        env=environment(),
        stdout=subprocess.PIPE,
        timeout=TIMEOUT_S,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])["files"]
    for path in paths:
        aligned = {
            tensor.name
            for tensor in trimsfs.open(path).table.tensors
            if tensor.nbytes and tensor.offset % 64 == 0
            if library == "jax" or tensor.dtype not in FLOATS_OF_8_BITS
        }
        assert found[path.name]["facts"] == facts[path.name], path.name
        assert set(found[path.name]["shared"]) == aligned, path.name
