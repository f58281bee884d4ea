"""Members that fail one after the other: programs on all of them read on, and get the right bytes."""

import random
from pathlib import Path

import pytest

from tests.fleet.chaos import TROUBLES, Chaos, wreak
from tests.fleet.members import a_fleet
from tests.fleet.reading import read_together
from tests.fleet.stores import a_fast_store
from tests.support.mounts import let_in
from tests.support.network import MEGABIT, a_network

MIB = 1 << 20
RATE = 200 * MEGABIT
FILES, SIZE = 6, 11 * MIB
CACHE = 3 * SIZE
"""Of each member: what it reads is mostly not there any more."""
PATIENCE_S = 20
"""No read of a file takes longer, beside the trouble itself."""


@pytest.mark.parametrize(
    ("hosts", "troubles", "lasts_s", "every_s"),
    [
        pytest.param(3, len(TROUBLES), 1, 0, marks=pytest.mark.slow),
        pytest.param(8, 60, 5, 10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_programs_read_on_beside_members_that_fail(
    tmp_path: Path, short_path: Path, hosts: int, troubles: int, lasts_s: float, every_s: float
) -> None:
    chance = random.Random(hosts)
    expected = tmp_path / "expected"
    expected.mkdir()
    for number in range(FILES):
        (expected / f"file{number}").write_bytes(chance.randbytes(SIZE))
    last = tmp_path / "last"
    last.write_bytes(chance.randbytes(SIZE))
    let_in(tmp_path)
    with a_network() as network, a_fast_store(network.host(RATE), tmp_path / "store") as store:
        store.put({path.name: path.read_bytes() for path in (*expected.iterdir(), last)})
        places = [network.host(RATE) for _ in range(hosts)]
        with a_fleet(short_path, store, places, "--cache-size", str(CACHE)) as fleet:
            fleet.up(fleet.members)
            chaos = Chaos(fleet, expected, RATE, chance, lasts_s)
            wreak(chaos, troubles, every_s)
            before = store.sent_bytes()
            read_together(fleet.members, last.name, last)
            assert store.sent_bytes() - before <= 2 * SIZE
    assert sum(outcome["reads"] for outcome in chaos.outcomes) > troubles
    assert [
        (each["member"], each["errors"], each["wrong"]) for each in chaos.outcomes if each["errors"] or each["wrong"]
    ] == []
    assert max(outcome["longest_s"] for outcome in chaos.outcomes) < PATIENCE_S + lasts_s
