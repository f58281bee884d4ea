"""Frameworks, unmodified, in processes and environments of their own, load models by path through mounts.

What they compute must equal what they compute from a local copy.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks import PROGRAMS
from tests.services.ceph import Ceph
from tests.support.frameworks import python_of, report_of
from tests.support.mounts import MountedStore, mounted

VARYING = ("_s", "_kib")
"""Ends of the names of results that differ from run to run."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def run(program: str, directory: Path, *more: str) -> dict[str, Any]:
    """Run a program on a directory; its results, without those that vary."""
    framework = "mxnet" if program.startswith("mxnet") else "others"
    results = report_of([python_of(framework), PROGRAMS / f"{program}.py", directory, *more])
    return {name: value for name, value in results.items() if not name.endswith(VARYING)}


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
    if Path(python_of("mxnet")).exists():
        run("mxnet_build", local / "mxnet", "--model", "resnet18_v1")
    run("torch_build", local / "torch")
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
        # By default, tests/engines have their files loaded from a mount of the same server.
        pytest.param("torch_load", "torch", marks=pytest.mark.slow),
        pytest.param("safetensors_load", "torch", marks=pytest.mark.slow),
        ("numpy_load", "torch"),
        ("onnxruntime_load", "torch"),
    ],
)
def test_framework_computes_the_same_from_the_mount(models: Models, program: str, model: str, store: str) -> None:
    mount = models.mounts[store]

    assert run(program, mount.path / model) == run(program, models.local / model)
    assert mount.metrics()["trimsfs_files_open_handles"] == 0
