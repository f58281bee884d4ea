"""What is fetched in the background, what lifts it, and what comes first."""

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import InLoop, until
from tests.support.stores import as_store
from tests.unit.workshop import Bench, Workshop
from trimsfs.errors import CacheFullError
from trimsfs.fetch.copier import Arrived, Extent, Landed
from trimsfs.fetch.flights import Prefetch, Priority, Urgency
from trimsfs.telemetry.open_trace import Spent
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation

Fetch = Callable[[Bench, Blob], Awaitable[object]]


class Recording(InLoop):
    """Remembers the priority of each fetch, by key."""

    def __init__(self, workshop: Workshop) -> None:
        super().__init__(as_store(workshop.store), threads=8)
        self.given: list[tuple[str, Priority]] = []

    async def fetch(
        self,
        generation: Generation,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None = None,
        *,
        eager: bool = False,
        spent: Spent | None = None,
        priority: Priority | None = None,
    ) -> str | None:
        assert priority is not None
        self.given.append((generation.key, priority))
        return await super().fetch(generation, extent, landed, arrived, eager=eager, spent=spent, priority=priority)

    def background(self, key: str) -> set[bool]:
        """Whether the fetches of an object are in the background by now."""
        return {priority.background for asked, priority in self.given if asked == key}


@pytest.fixture
def copier(workshop: Workshop) -> Recording:
    return Recording(workshop)


async def warm(bench: Bench, blob: Blob) -> None:
    """As the command does."""
    await bench.fetcher.fetch_all(blob, Urgency.COMMAND)


async def listing(bench: Bench, blob: Blob) -> None:
    """As a listing does, which guesses that an open follows."""
    await bench.fetcher.fetch_all(blob, Urgency.AHEAD, guessed=True)


async def model_readahead(bench: Bench, blob: Blob) -> None:
    """As the load of a model does, which will open its next file."""
    await bench.fetcher.fetch_all(blob, Urgency.AHEAD)


async def waiting_open(bench: Bench, blob: Blob) -> None:
    """As an open does that waits for all of the file."""
    await bench.fetcher.fetch_all(blob)


async def reader(bench: Bench, blob: Blob) -> None:
    """As an open does that does not wait, and a first read."""
    bench.fetcher.hold(blob)
    await bench.read(blob, 0, 10)


async def reader_at_the_end(bench: Bench, blob: Blob) -> None:
    """A reader of bytes whose fetch has not begun."""
    bench.fetcher.hold(blob)
    await bench.read(blob, blob.generation.size - 1, blob.generation.size)


async def other_host(bench: Bench, blob: Blob) -> None:
    await bench.fetcher.fetch_for_others(blob, range(len(blob.states)))


# In the background or not


@pytest.mark.parametrize(
    ("fetch", "background"),
    [
        (warm, True),
        (listing, True),
        (model_readahead, False),
        (waiting_open, False),
        (reader, False),
        (other_host, False),
    ],
)
async def test_what_no_program_waits_for_is_fetched_in_the_background(
    workshop: Workshop, copier: Recording, fetch: Fetch, background: bool
) -> None:
    bench, blob, _ = await workshop.opened(6, transfer=copier)
    await fetch(bench, blob)
    await until(lambda: blob.complete)
    assert copier.background("a") == {background}


@pytest.mark.parametrize("under_way", [warm, listing])
@pytest.mark.parametrize("fetch", [waiting_open, reader, reader_at_the_end, model_readahead, other_host])
async def test_who_waits_lifts_what_is_under_way(
    workshop: Workshop, copier: Recording, under_way: Fetch, fetch: Fetch
) -> None:
    workshop.put("a", 12)
    workshop.put("other", 3)
    bench = await workshop.bench(requests=4, transfer=copier)
    blob, other = await bench.acquire("a"), await bench.acquire("other")
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        for each in (blob, other):
            nursery.start_soon(under_way, bench, each)
            await wait_all_tasks_blocked()
        assert copier.background("a") == {True}
        begun = len(copier.given)
        nursery.start_soon(fetch, bench, blob)
        await wait_all_tasks_blocked()
        assert {priority.background for key, priority in copier.given[:begun] if key == "a"} == {False}
        assert copier.background("other") <= {True}
        gate.set()
    assert copier.background("a") == {False}
    assert copier.background("other") == {True}


@pytest.mark.parametrize("first", [warm, listing])
@pytest.mark.parametrize("second", [warm, listing])
async def test_what_no_program_waits_for_lifts_nothing(
    workshop: Workshop, copier: Recording, first: Fetch, second: Fetch
) -> None:
    bench, blob, _ = await workshop.opened(6, requests=2, transfer=copier)
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        for fetch in (first, second):
            nursery.start_soon(fetch, bench, blob)
            await wait_all_tasks_blocked()
        gate.set()
    assert copier.background("a") == {True}


async def test_what_readers_have_left_goes_on_in_the_background(
    workshop: Workshop, copier: Recording, chunk_size: int
) -> None:
    bench, blob, _ = await workshop.opened(6, requests=1, transfer=copier)
    gate = bench.store.block(offset=chunk_size)
    await reader(bench, blob)
    await bench.store.arrived(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(warm, bench, blob)
        await wait_all_tasks_blocked()
        bench.fetcher.unhold(blob)
        gate.set()
    assert [priority.background for _, priority in copier.given] == [False] * 2 + [True] * 4


def test_a_priority_is_lifted_once() -> None:
    told: list[int] = []
    priority = Priority(background=True)
    for number in range(2):
        priority.on_lift(partial(told.append, number))
    for _ in range(2):
        priority.lift()
    assert (told, priority.background) == ([0, 1], False)
    ordinary = Priority()
    ordinary.on_lift(lambda: pytest.fail("lifted"))
    ordinary.lift()


async def test_a_listing_beside_the_load_of_a_model_leaves_it_in_the_foreground(workshop: Workshop) -> None:
    workshop.put("a", 2)
    prefetch = Prefetch(await (await workshop.bench()).acquire("a"))
    assert prefetch.in_background
    with prefetch.asked_for(Urgency.AHEAD, guessed=True):
        assert prefetch.in_background
        with prefetch.asked_for(Urgency.AHEAD):
            assert not prefetch.in_background
        assert prefetch.in_background
        with prefetch.asked_for(Urgency.COMMAND):
            assert prefetch.in_background


# What comes first


@pytest.mark.parametrize(
    ("sizes", "steps", "orders"),
    [
        pytest.param(
            {"a": 6, "b": 6}, [(reader, "a"), (reader, "b")], {"ab" * 6, "ab" + "ba" * 5}, id="readers, in turns"
        ),
        pytest.param(
            {"o": 3, "n": 3, "l": 3},
            [(reader, "o"), (model_readahead, "n"), (model_readahead, "l")],
            {"ooonnnlll"},
            id="what is open, then what comes ahead, in order",
        ),
        pytest.param(
            {"n": 8, "l": 3},
            [(model_readahead, "n"), (model_readahead, "l"), (waiting_open, "l")],
            {"n" + "lll" + "n" * 7},
            id="who waits, then what comes ahead",
        ),
        *(
            pytest.param({"c": 5, "p": 4}, [(warm, "c"), (fetch, "p")], {"c" + "pppp" + "cccc"}, id=fetch.__name__)
            for fetch in (waiting_open, reader, model_readahead)
        ),
    ],
)
async def test_flights_start_in_the_order_of_who_waits(
    workshop: Workshop, sizes: dict[str, int], steps: list[tuple[Fetch, str]], orders: set[str]
) -> None:
    for key, chunks in sizes.items():
        workshop.put(key, chunks)
    bench = await workshop.bench(requests=1)
    blobs = {key: await bench.acquire(key) for key in sizes}
    gate = bench.store.block()
    async with trio.open_nursery() as nursery:
        for fetch, key in steps:
            nursery.start_soon(fetch, bench, blobs[key])
            await bench.store.arrived(1)
            await wait_all_tasks_blocked()
        gate.set()
    await until(lambda: all(blob.complete for blob in blobs.values()))
    assert "".join(request.key for request in bench.store.requests) in orders


async def test_an_open_that_waits_begins_though_a_command_takes_all_slots(workshop: Workshop) -> None:
    workshop.put("command", 40)
    workshop.put("program", 2)
    bench = await workshop.bench(requests=32)
    commanded, opened = await bench.acquire("command"), await bench.acquire("program")
    gate = bench.store.block(key="command")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(warm, bench, commanded)
        await wait_all_tasks_blocked()
        assert bench.fetcher.statistics().in_flight == bench.fetcher.statistics().request_limit < 32
        nursery.start_soon(waiting_open, bench, opened)
        await until(lambda: bool(bench.store.reads("program")))
        gate.set()


# Room on the disk


@pytest.mark.parametrize("fetch", [warm, waiting_open])
async def test_a_command_evicts_as_an_open_does(workshop: Workshop, fetch: Fetch) -> None:
    workshop.put("old", 4)
    content = workshop.put("new", 4)
    bench = await workshop.bench(budget=5)
    old = await bench.acquire("old")
    await waiting_open(bench, old)
    await until(bench.idle)
    bench.tier.blobs.release(old)
    new = await bench.acquire("new")
    await fetch(bench, new)
    assert new.view(0, len(content)) == content
    assert (await bench.tier.residencies.of(bench.store.generation("old"))).disk_bytes == 0


@pytest.mark.parametrize(("fetch", "fetched"), [(warm, True), (waiting_open, True), (listing, False)])
async def test_once_the_disk_was_full_only_guesses_try_no_more(workshop: Workshop, fetch: Fetch, fetched: bool) -> None:
    workshop.put("large", 6)
    workshop.put("small", 0.3)
    bench = await workshop.bench(requests=1, budget=4.5)
    large, small = await bench.acquire("large"), await bench.acquire("small")
    with pytest.raises(CacheFullError):
        await waiting_open(bench, large)
    if fetched:
        await fetch(bench, small)
    else:
        with pytest.raises(CacheFullError):
            await fetch(bench, small)
    assert bool(bench.store.reads("small")) == small.complete == fetched
