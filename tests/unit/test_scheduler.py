"""The order in which flights start."""

import pytest

from tests.unit.workshop import Workshop
from trimsfs.fetch.prefetch import Urgency
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.types import Generation


async def test_while_the_store_is_busy_no_prefetch_is_looked_for(workshop: Workshop) -> None:
    workshop.put("a", 3)
    blob = await (await workshop.bench()).acquire("a")
    scheduler = FlightScheduler(batch_limit=1)
    scheduler.hold(blob).demand(0)
    looked_at: list[Generation] = []

    def full(generation: Generation) -> bool:
        looked_at.append(generation)
        return False

    assert scheduler.next_prefetched([0, 16], full=full) == []
    assert looked_at == []
    assert [flight.chunk for flight in scheduler.next_prefetched([1, 16], full=full)] == [1]
    assert looked_at == [blob.generation]


@pytest.mark.parametrize(("least", "taken"), [(1, 1), (3, 3), (0, 1), (100, 4)])
async def test_requests_for_who_waits_for_all_of_a_file_are_not_smaller_than_is_worth_it(
    workshop: Workshop, least: int, taken: int
) -> None:
    workshop.put("a", 9)
    blob = await (await workshop.bench()).acquire("a")
    scheduler = FlightScheduler(batch_limit=4, least=lambda: least)
    with scheduler.hold(blob).asked_for(Urgency.WANTED):
        assert len(scheduler.next_prefetched([16, 16], full=lambda _: False)) == taken
