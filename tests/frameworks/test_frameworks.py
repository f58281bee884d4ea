"""Frameworks, unmodified, in processes and environments of their own, load models by path through mounts.

What they compute must equal what they compute from a local copy.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks import PROGRAMS
from tests.services.ceph import Ceph
from tests.support.mounts import TRIMSFS, MountedStore, mounted

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
VARYING = ("_s", "_kib")
"""Ends of the names of results that differ from run to run."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def python_of(framework: str) -> str:
    """The interpreter that has a framework: one of the environments that the Makefile makes."""
    default = ROOT / (".venv-mxnet" if framework == "mxnet" else ".venv-frameworks")
    python = Path(os.environ.get(f"TEST_{default.name[6:].upper()}", default)) / "bin/python"
    if framework == "mxnet" and not python.exists():
        pytest.skip("MXNet 1.9 needs Python 3.11 or older, which is not here")
    return str(python)


def run(program: str, directory: Path) -> dict[str, Any]:
    """Run a program on a directory; its results, without those that vary."""
    framework = "mxnet" if program.startswith("mxnet") else "others"
    results = _report([python_of(framework), PROGRAMS / f"{program}.py", directory])
    return {name: value for name, value in results.items() if not name.endswith(VARYING)}


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
    return _report(command, environment, timeout_s)


def _report(
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


@dataclass(frozen=True, slots=True)
class Models:
    """A directory of built models, and the same below a mount of each kind of store."""

    local: Path
    mounts: dict[str, MountedStore]


@pytest.fixture(scope="module")
def models(ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    directory = tmp_path_factory.mktemp("models")
    local = directory / "store"
    local.mkdir()
    for framework in ("mxnet", "torch"):
        if framework == "torch" or Path(python_of(framework)).exists():
            run(f"{framework}_build", local / framework)
    client = ceph.client()
    client.create_bucket(Bucket="frameworks")
    for path in sorted(local.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "frameworks", str(path.relative_to(local)))
    client.close()
    with (
        mounted(local, directory / "from-directory") as from_directory,
        mounted("s3://frameworks", directory / "from-s3", environment=ceph.environment()) as from_s3,
    ):
        yield Models(local, {"directory": from_directory, "s3": from_s3})


@pytest.mark.parametrize("store", [pytest.param("directory", marks=pytest.mark.slow), "s3"])
@pytest.mark.parametrize(
    ("program", "model"),
    [
        ("mxnet_load", "mxnet"),
        ("torch_load", "torch"),
        ("safetensors_load", "torch"),
        ("numpy_load", "torch"),
        ("onnxruntime_load", "torch"),
    ],
)
def test_framework_computes_the_same_from_the_mount(models: Models, program: str, model: str, store: str) -> None:
    mount = models.mounts[store]

    assert run(program, mount.path / model) == run(program, models.local / model)
    assert mount.metrics()["trimsfs_files_open_handles"] == 0
