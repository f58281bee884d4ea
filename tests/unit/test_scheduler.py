"""The order in which flights start."""

import pytest

from tests.unit.workshop import Workshop
from trimsfs.fetch.flights import Urgency
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.types import Generation


async def test_while_the_store_is_busy_no_prefetch_is_looked_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.put("a", 3)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    scheduler = FlightScheduler(bench.tier, batch_limit=1)
    scheduler.hold(blob).demand(0)
    looked_at: list[Generation] = []

    def full(generation: Generation) -> bool:
        looked_at.append(generation)
        return False

    monkeypatch.setattr(bench.tier.space, "full", full)
    assert scheduler.next_prefetched([0, 16]) == ([], False)
    assert looked_at == []
    batch, held_back = scheduler.next_prefetched([1, 16])
    assert ([flight.chunk for flight in batch], held_back) == ([1], False)
    assert looked_at == [blob.generation]


@pytest.mark.parametrize(("least", "taken"), [(1, 1), (3, 3), (0, 1), (100, 4)])
async def test_requests_for_who_waits_for_all_of_a_file_are_not_smaller_than_is_worth_it(
    workshop: Workshop, least: int, taken: int
) -> None:
    workshop.put("a", 9)
    bench = await workshop.bench()
    blob = await bench.acquire("a")
    scheduler = FlightScheduler(bench.tier, batch_limit=4)
    with scheduler.hold(blob).asked_for(Urgency.WANTED):
        assert len(scheduler.next_prefetched([16, 16], least=least)[0]) == taken
