"""How a fleet spreads an object over hundreds of hosts, in virtual time: the placement is the real one."""

import pytest

from tests.fleet.simulation import Simulation
from trimsfs.extras.fleet.serving.uploads import MOST_OF_CHUNK

CHUNKS = 64
UNBOUNDED = 10**6


@pytest.mark.parametrize(("hosts", "bound"), [(2, 1.2), (10, 2.5), (100, 5.5), (1000, 9)])
def test_all_hosts_have_an_object_soon_and_the_store_sends_it_once(hosts: int, bound: float) -> None:
    """Each from the store, a hundred hosts would take a hundred times as long as one, a thousand a thousand times."""
    run = Simulation(hosts, CHUNKS, content="model")
    assert run.store_chunks == CHUNKS
    assert sum(run.sent) == CHUNKS * (hosts - 1)
    assert min(run.ends) >= CHUNKS
    assert max(run.ends) / CHUNKS < bound


def test_two_owners_are_busier_alike_than_one() -> None:
    one, two = (
        [Simulation(10, CHUNKS, content=f"model-{number}", owners=owners) for number in range(10)] for owners in (1, 2)
    )
    assert sum(max(run.sent) for run in two) < 0.85 * sum(max(run.sent) for run in one)
    assert sum(max(run.ends) for run in two) < 0.9 * sum(max(run.ends) for run in one)


def test_a_hot_chunk_spreads_from_host_to_host() -> None:
    """Owners that sent it to all others themselves would take much longer."""
    referring, alone = (Simulation(400, CHUNKS, content="model", most=most) for most in (MOST_OF_CHUNK, UNBOUNDED))
    assert max(referring.ends) < max(alone.ends) / 2
