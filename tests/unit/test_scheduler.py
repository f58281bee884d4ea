"""The order in which flights start."""

import pytest
from trio.testing import MockClock

from tests.unit.workshop import Workshop
from trimsfs.fetch.flights import Lane, Urgency
from trimsfs.fetch.scheduler import FlightScheduler, Slots
from trimsfs.fetch.store_requests import StoreSpeed
from trimsfs.types import Generation


async def test_while_the_store_is_busy_no_prefetch_is_looked_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, blob, _ = await workshop.opened(3)
    scheduler = FlightScheduler(bench.tier.blobs, bench.tier.space, batch_limit=1)
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
    bench, blob, _ = await workshop.opened(9)
    scheduler = FlightScheduler(bench.tier.blobs, bench.tier.space, batch_limit=4)
    with scheduler.hold(blob).asked_for(Urgency.WANTED):
        assert len(scheduler.next_prefetched([16, 16], least=least)[0]) == taken


async def test_a_short_burst_measures_the_store(mock_clock: MockClock) -> None:
    speed = StoreSpeed(max_requests=4)
    slots = Slots(speed, None)
    for _ in range(2):
        slots.take(Lane.STORE, for_others=False)
        mock_clock.jump(0.1)
        speed.throughput.add(10 << 20)
        slots.give_back(Lane.STORE, for_others=False)
        assert speed.throughput.rate == pytest.approx((10 << 20) / 0.1)
        mock_clock.jump(60)
        speed.throughput.add(5 << 20)  # by a request of the server itself, while no batch is under way
