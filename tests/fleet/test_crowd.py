"""Hosts without a fleet that crowd a store's link."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fleet.members import a_fleet
from tests.fleet.stores import a_real_store
from tests.support.network import MEGABIT, a_network

HOSTS, RATE, STORE_RATE = 8, 200 * MEGABIT, 64 * MEGABIT
NAME, MODEL = "model", random.Random(25).randbytes(96 << 20)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hosts_that_crowd_the_link_of_a_store_get_all_bytes(short_path: Path) -> None:
    with a_network() as network, a_real_store(network.host(STORE_RATE)) as store:
        store.put({NAME: MODEL})
        hosts = [network.host(RATE) for _ in range(HOSTS)]
        with a_fleet(short_path, store, hosts, alone=True) as fleet:
            fleet.up(fleet.members)
            with ThreadPoolExecutor(HOSTS) as threads:
                read = list(threads.map(lambda member: (member.mount.path / NAME).read_bytes(), fleet.members))
    assert [found == MODEL for found in read] == [True] * HOSTS
