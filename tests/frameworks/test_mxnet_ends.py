"""MXNet programs under ``trimsfs run``: what they drop is unmapped, and they end as they should."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.frameworks import PROGRAMS
from tests.support.frameworks import TIMEOUT_S, python_of, run_mxnet
from tests.support.mounts import TRIMSFS, MountedStore, mounted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A network ``net``, and a file of two arrays, ``params``."""
    scratch = tmp_path_factory.mktemp("ends")
    store = scratch / "store"
    store.mkdir()
    subprocess.run([python_of("mxnet"), PROGRAMS / "mxnet_end.py", store, "build"], check=True, timeout=TIMEOUT_S)
    subprocess.run(
        [TRIMSFS, "run", "--", python_of("mxnet"), PROGRAMS / "mxnet_drop.py", store / "params", "--build"],
        check=True,
        timeout=TIMEOUT_S,
    )
    with mounted(store, scratch) as mount:
        yield mount


@pytest.mark.parametrize("engine", ["ThreadedEnginePerDevice", pytest.param("NaiveEngine", marks=pytest.mark.slow)])
def test_what_is_dropped_is_unmapped(mount: MountedStore, engine: str) -> None:
    report = run_mxnet("mxnet_drop", mount.path / "params", shared=True, environment={"MXNET_ENGINE_TYPE": engine})
    print(report)
    assert len(report) == 5
    assert None not in report.values()


@pytest.mark.parametrize(
    "way", ["inferring", *(pytest.param(way, marks=pytest.mark.slow) for way in ("loading", "raising"))]
)
def test_a_program_ends_whatever_goes_on_in_it(mount: MountedStore, way: str) -> None:
    for _ in range(3):
        done = subprocess.run(
            [TRIMSFS, "run", "--", python_of("mxnet"), "-W", "ignore", PROGRAMS / "mxnet_end.py", mount.path, way],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == (3 if way == "raising" else 0), done.stderr
