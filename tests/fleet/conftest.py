"""A network with a store and three hosts, for the tests of a module."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.members import Fleet, a_fleet
from tests.fleet.stores import a_fast_store
from tests.services import SCRATCH
from tests.support.mounts import let_in
from tests.support.network import MEGABIT, a_network

HOSTS = 3
RATE = 1000 * MEGABIT


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty directory whose path leaves room for those of sockets, that all users may enter."""
    with tempfile.TemporaryDirectory(prefix="trimsfs-fleet-", dir=SCRATCH) as directory:
        let_in(Path(directory))
        yield Path(directory)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three members, all up."""
    directory = tmp_path_factory.mktemp("fleet")
    let_in(directory)
    with a_network() as network, a_fast_store(network.host(RATE), directory / "store") as store:
        hosts = [network.host(RATE) for _ in range(HOSTS)]
        with a_fleet(directory / "members", store, hosts, "--metadata-ttl", "1") as fleet:
            fleet.up(fleet.members)
            yield fleet
