"""Members that fail one after the other: programs on all of them read on, and get the right bytes."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fleet.chaos import TROUBLES, Chaos, wreak
from tests.fleet.members import a_fleet
from tests.fleet.reading import read_together
from tests.fleet.stores import FleetStore, a_fast_store
from tests.support.mounts import let_in
from tests.support.network import MEGABIT, a_network

MIB = 1 << 20
RATE = 200 * MEGABIT
FILES, SIZE = 6, 11 * MIB
CACHE = 3 * SIZE
"""Of each member, if it is small: what it reads is mostly not there any more."""
NEW_SIZE = 24 * MIB
"""Of each file that is new when a trouble begins."""
PATIENCE_S = 20
"""No read of a file takes longer, beside the trouble itself."""
FEW = pytest.param(3, len(TROUBLES), 1, 0, marks=pytest.mark.slow)
MANY = pytest.param(8, 60, 5, 10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


def _files(directory: Path, chance: random.Random, count: int, size: int) -> list[Path]:
    """Files with random content. Their names are no sequence, which members would fetch ahead of."""
    directory.mkdir()
    paths = [directory / chance.randbytes(4).hex() for _ in range(count)]
    for path in paths:
        path.write_bytes(chance.randbytes(size))
    return paths


def _check(chaos: Chaos, troubles: int) -> None:
    reads = sum(outcome["reads"] for outcome in chaos.outcomes)
    longest_s = max(outcome["longest_s"] for outcome in chaos.outcomes)
    print(f"{reads} reads of whole files, the longest in {longest_s:.1f} s")
    assert reads > troubles
    assert [
        (each["member"], each["errors"], each["wrong"]) for each in chaos.outcomes if each["errors"] or each["wrong"]
    ] == []
    assert longest_s < PATIENCE_S + chaos.lasts_s


@contextmanager
def _a_chaos(
    directory: Path, short_path: Path, files: Sequence[Path], hosts: int, lasts_s: float, *options: str
) -> Iterator[tuple[FleetStore, Chaos]]:
    """A store with these files, and members that are up; programs read those in ``expected`` below the directory."""
    let_in(directory)
    with a_network() as network, a_fast_store(network.host(RATE), directory / "store") as store:
        store.put({path.name: path.read_bytes() for path in files})
        places = [network.host(RATE) for _ in range(hosts)]
        with a_fleet(short_path, store, places, *options) as fleet:
            fleet.up(fleet.members)
            yield store, Chaos(fleet, directory / "expected", RATE, random.Random(hosts), lasts_s)


@pytest.mark.parametrize(("hosts", "troubles", "lasts_s", "every_s"), [FEW, MANY])
def test_programs_read_on_beside_members_that_fail(
    tmp_path: Path, short_path: Path, hosts: int, troubles: int, lasts_s: float, every_s: float
) -> None:
    files = _files(tmp_path / "expected", random.Random(hosts), FILES, SIZE)
    with _a_chaos(tmp_path, short_path, files, hosts, lasts_s, "--cache-size", str(CACHE)) as (_, chaos):
        wreak(chaos, troubles, every_s)
    _check(chaos, troubles)


@pytest.mark.parametrize(("hosts", "troubles", "lasts_s", "every_s"), [FEW, MANY])
def test_the_store_sends_new_files_about_once_beside_members_that_fail(
    tmp_path: Path, short_path: Path, hosts: int, troubles: int, lasts_s: float, every_s: float
) -> None:
    files = _files(tmp_path / "new", random.Random(hosts), troubles + 1, NEW_SIZE)
    *new, last = files
    (tmp_path / "expected").mkdir()
    left = iter(new)

    def publish() -> None:
        path = next(left)
        (tmp_path / "expected" / path.name).hardlink_to(path)

    with _a_chaos(tmp_path, short_path, files, hosts, lasts_s) as (store, chaos):
        publish()
        wreak(chaos, troubles - 1, every_s, before=publish)
        before = store.sent_bytes()
        print(f"store bytes: {before / (troubles * NEW_SIZE):.2f} x")
        read_together(chaos.fleet.members, last.name, last)
        print(f"of the last file: {(store.sent_bytes() - before) / NEW_SIZE:.2f} x")
        assert before <= 1.5 * troubles * NEW_SIZE
        assert store.sent_bytes() - before <= 2 * NEW_SIZE
    _check(chaos, troubles)
