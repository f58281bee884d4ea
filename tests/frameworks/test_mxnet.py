"""Plain MXNet programs under ``trimsfs run``: the same results bit for bit, and nothing copied."""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.services.ceph import Ceph
from tests.support.frameworks import python_of, run_mxnet
from tests.support.mounts import TRIMSFS, MountedStore, mounted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def loaders(*arguments: str | Path, shared: bool = False) -> dict[str, Any]:
    return run_mxnet("mxnet_loaders", *arguments, shared=shared)


@dataclass(frozen=True, slots=True)
class Network:
    """A directory with a network, the same on a mount of a bucket, and what plain MXNet makes of the directory."""

    local: Path
    mount: MountedStore
    plain: dict[str, Any]


@pytest.fixture(scope="module")
def network(ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    scratch = tmp_path_factory.mktemp("mxnet")
    local = scratch / "store"
    loaders("--build", local)
    client = ceph.client()
    client.create_bucket(Bucket="mxnet")
    for path in filter(Path.is_file, local.rglob("*")):
        client.upload_file(str(path), "mxnet", str(path.relative_to(local)))
    client.close()
    with mounted("s3://mxnet", scratch, environment=ceph.environment()) as mount:
        yield Network(local, mount, loaders(local))


def test_every_loader_gives_the_same(network: Network) -> None:
    shared = loaders(network.mount.path, shared=True)
    for name, result in network.plain["results"].items():
        assert shared["results"][name] == result, name
    assert (shared["mapped"], network.plain["mapped"]) == (True, False)


def test_off_the_mount_mxnet_loads_as_ever(network: Network) -> None:
    elsewhere = loaders(network.local, shared=True)
    assert (elsewhere["results"], elsewhere["mapped"]) == (network.plain["results"], False)


def test_what_becomes_of_a_model_is_told_when_asked_for(network: Network) -> None:
    there, elsewhere = (str(next(root.rglob("*.params"))) for root in (network.mount.path, network.local))
    command = [TRIMSFS, "run", "--verbose", "--", python_of("mxnet"), "-W", "ignore"]
    program = "import sys, mxnet; [mxnet.nd.load(path) for path in sys.argv[1:]]"
    done = subprocess.run(
        [*command, "-c", program, there, elsewhere], capture_output=True, text=True, timeout=60, check=True
    )
    mapped, left = (line for line in done.stderr.splitlines() if line.startswith("trimsfs: "))
    assert mapped.startswith(f"trimsfs: {there}: ")
    assert re.search(r": mapped \d+ arrays$", mapped)
    assert left == f"trimsfs: {elsewhere}: not mapped: it is on no mount"


def test_without_trimsfs_run_a_mount_is_read(network: Network) -> None:
    read = loaders(network.mount.path)
    assert (read["results"], read["mapped"]) == (network.plain["results"], False)
