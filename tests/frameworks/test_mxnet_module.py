"""MXNet's Modules and executors under ``trimsfs run``: parameters are not copied, and nothing else is different."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.frameworks import run_mxnet
from tests.support.mounts import MountedStore, mounted
from trimsfs.client import pages

FUSED, PLAIN = "MKLDNN", "NONE"
"""What MXNet makes of a graph: operators that keep weights as they need them, which is its default, or those there are,
which rewrite them in place."""
COPIES = {"load": 1.9, "set": 2.8, "executor": 1.9}
"""Of the parameters, that MXNet makes at least until a model can compute, by the way it is loaded."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def program(*arguments: str | Path, shared: bool, graph: str = FUSED) -> dict[str, Any]:
    return run_mxnet("mxnet_module", *arguments, shared=shared, environment={"MXNET_SUBGRAPH_BACKEND": graph})


@dataclass(frozen=True, slots=True)
class Networks:
    """A directory with networks, and the same on a mount."""

    local: Path
    mount: MountedStore

    @property
    def nbytes(self) -> int:
        """Of the parameters of the one whose memory is looked at."""
        return (self.local / "images-0000.params").stat().st_size


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Networks]:
    scratch = tmp_path_factory.mktemp("mxnet")
    local = scratch / "store"
    program("--build", local, shared=False)
    with mounted(local, scratch) as mount:
        yield Networks(local, mount)


@pytest.fixture
def telling() -> None:
    """A kernel that can tell what of a mapping has been written to."""
    try:
        pages.own(0, 0)
    except OSError:
        pytest.skip("needs Linux 6.7")


@pytest.mark.parametrize("graph", [FUSED, pytest.param(PLAIN, marks=pytest.mark.slow)])
def test_every_way_gives_the_same(networks: Networks, graph: str) -> None:
    expected = program(networks.local, shared=False, graph=graph)
    on_mount = program(networks.mount.path, shared=True, graph=graph)
    for way, outcome in expected.items():
        assert on_mount[way] == outcome, way


@pytest.mark.slow
def test_off_the_mount_everything_is_as_ever(networks: Networks) -> None:
    assert program(networks.local, shared=True) == program(networks.local, shared=False)


@pytest.mark.usefixtures("telling")
@pytest.mark.parametrize("graph", [FUSED, pytest.param(PLAIN, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "way", ["load", *(pytest.param(way, marks=pytest.mark.slow) for way in COPIES if way != "load")]
)
def test_parameters_are_not_copied(networks: Networks, way: str, graph: str) -> None:
    expected = program("--memory", way, networks.local, shared=False, graph=graph)
    found = program("--memory", way, networks.mount.path, shared=True, graph=graph)
    assert expected["private"] > COPIES[way]
    assert found["private"] < 0.5
    assert {*found["outputs"], *found["afterwards"]} == {*expected["outputs"], *expected["afterwards"]}
    assert len(set(expected["outputs"])) == 1
    if graph == PLAIN:
        assert found["rewritten"] > 0.8 * networks.nbytes
        assert found["left"] < 0.1 * networks.nbytes


@pytest.mark.usefixtures("telling")
def test_changed_parameters_stay_changed_when_folding_has_moved_them(networks: Networks) -> None:
    expected = program("--folded-before", networks.local, shared=False)
    found = program("--folded-before", networks.mount.path, shared=True)
    assert found["rewritten"] > 0.8 * networks.nbytes
    assert found["left"] < 0.1 * networks.nbytes
    assert found["outputs"] == expected["outputs"]
