"""Listings: large ones are small in memory, hold nobody up, and of too many the oldest are forgotten."""

import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore, as_store
from tests.unit.namespace.common import TTL_S, a_generation, look
from trimsfs.namespace.inodes import InodeKind
from trimsfs.namespace.known_directories import Directories
from trimsfs.namespace.listing import SLICE, STEP, Entry, Listing, NonObject
from trimsfs.namespace.tree import LISTED_TTL_S, Namespace
from trimsfs.origins import by_path
from trimsfs.stores.base import Page
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.types import Generation

MANY = 40 * SLICE


def pages(generations: list[Generation], prefixes: list[str]) -> Iterator[Page]:
    """Pages of some names each."""
    size = 2 * SLICE + 1
    for start in range(0, max(len(generations), len(prefixes)), size):
        part = slice(start, start + size)
        yield Page(objects=tuple(generations[part]), prefixes=tuple(prefixes[part]), next_token=None)


async def listing_of(prefix: str, generations: list[Generation], prefixes: list[str] | None = None) -> Listing:
    listing = Listing(prefix)
    for page in pages(generations, prefixes or []):
        await listing.add(page)
    await listing.put_in_order()
    return listing


@pytest.mark.parametrize("count", [0, 1, STEP - 1, STEP, STEP + 1, 3 * SLICE, MANY])
@pytest.mark.parametrize("shuffled", [False, True])
async def test_a_listing_has_all_names_in_order_whatever_the_order_of_its_pages(count: int, shuffled: bool) -> None:
    generations = [a_generation(f"dir/{number:06}", f'"{number}"') for number in range(count)]
    prefixes = [f"dir/{number:06}-below/" for number in range(0, count, 7)]
    expected: dict[bytes, Entry] = {generation.key[4:].encode(): generation for generation in generations}
    expected |= {prefix[4:-1].encode(): NonObject.DIRECTORY for prefix in prefixes}
    if shuffled:
        random.Random(1).shuffle(generations)
    listing = await listing_of("dir/", generations, prefixes)

    assert list(listing) == sorted(expected)
    assert dict(listing.items()) == expected
    assert {name: listing[name] for name in expected} == expected
    assert list(listing.items_from(count // 2)) == sorted(expected.items())[count // 2 :]
    for absent in (b"", b"000000-", b"0000005", b"999999", b"\xff"):
        assert absent not in listing


async def test_a_name_in_several_pages_counts_once_and_a_directory_wins() -> None:
    generations = [a_generation(f"{number:06}") for number in range(3 * SLICE)]
    listing = await listing_of("", [*generations, *generations], ["000001/", "000002/"])

    assert list(listing) == [b"%06d" % number for number in range(3 * SLICE)]
    assert (listing[b"000000"], listing[b"000001"]) == (generations[0], NonObject.DIRECTORY)
    assert listing.hidden == 4


async def test_what_has_another_content_is_found_among_many() -> None:
    generations = [a_generation(f"{number:06}") for number in range(3 * SLICE)]
    before = await listing_of("", generations)
    fewer = await listing_of("", generations[::2])
    changed = await listing_of("", [*generations[:-1], a_generation(generations[-1].key, '"y"')])

    assert not await fewer.shows_another(before)
    assert not await before.shows_another(fewer)
    assert await changed.shows_another(before)
    assert before.digest() == (await listing_of("", generations)).digest()
    assert len({listing.digest() for listing in (before, fewer, changed)}) == 3


@pytest.mark.parametrize(("versioned", "most"), [(False, 100), (True, 600)])
async def test_what_a_name_of_a_listing_takes_is_known(versioned: bool, most: int) -> None:
    def generations() -> Iterator[Generation]:
        for number in range(MANY):
            version = f"{number:040}" if versioned else None
            yield replace(a_generation(f"dir/model-{number:06}.bin", f'"{number:032}"'), version_id=version)

    tracemalloc.start()
    try:
        listing = Listing("dir/")
        await listing.extend((generation.key[4:], generation) for generation in generations())
        await listing.put_in_order()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert listing.size < most * MANY
    assert taken < 1.3 * listing.size


@pytest.mark.parametrize("shuffled", [False, True])
async def test_others_have_their_turn_while_a_listing_is_made(shuffled: bool) -> None:
    generations = [a_generation(f"{number:06}", f'"{number}"') for number in range(MANY)]
    if shuffled:
        random.Random(1).shuffle(generations)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        listing = await listing_of("", generations)
        made = turns
        assert not await listing.shows_another(listing)
        compared = turns - made
        nursery.cancel_scope.cancel()

    assert made > (2 if shuffled else 0.8) * MANY / SLICE
    assert compared > 0.8 * MANY / SLICE


async def test_of_too_many_directories_those_used_longest_ago_are_forgotten() -> None:
    store = MemoryStore({f"{number}/model": b"" for number in range(100)})
    namespace = Namespace(as_store(store), ttl_s=TTL_S)
    namespace._directories = Directories(by_path(CircuitBreaker(deadline_s=15)), 50_000)
    for number in range(100):
        await look(namespace, f"{number}/model")
        await look(namespace, "0/model")
    assert namespace.statistics().directories < 30
    listed = len(store.requests)
    assert await look(namespace, "0/model") == store.generation("0/model")
    assert await look(namespace, "99/model") == store.generation("99/model")
    assert len(store.requests) == listed
    assert await look(namespace, "1/model") == store.generation("1/model")
    assert len(store.requests) == listed + 1


async def test_a_directory_of_which_the_kernel_has_names_of_an_earlier_server_is_not_forgotten() -> None:
    known = Directories(by_path(CircuitBreaker(deadline_s=15)), 1)
    known.use("restored/").restore(b"name", NonObject.DIRECTORY)
    for number in range(10):
        known.use(f"{number}/")
    assert known.get("restored/") is not None
    assert len(known) == 2


async def test_a_file_of_a_directory_that_was_forgotten_is_found_to_be_replaced() -> None:
    store = MemoryStore({"dir/a": b"a", "dir/b": b"b", "other/c": b"c"})
    invalidated: list[bytes] = []
    namespace = Namespace(as_store(store), ttl_s=TTL_S, invalidate=lambda _, name: invalidated.append(name))
    namespace._directories = Directories(by_path(CircuitBreaker(deadline_s=15)), 1)
    before = await look(namespace, "dir/a")
    assert isinstance(before, Generation)
    for key in ("dir/a", "dir/b"):
        namespace.inodes.count_lookup(namespace.inodes.reference(InodeKind.OBJECT, key, store.generation(key)))
    await look(namespace, "other/c")
    assert namespace.statistics().directories == 1

    namespace.replaced(before)
    assert sorted(invalidated) == [b"a", b"b"]


async def test_the_kernel_may_use_a_listed_name_as_long_as_its_listing_is_believed(autojump_clock: MockClock) -> None:
    store = MemoryStore({"dir/a": b"a", "dir/b": b"b"})
    namespace = Namespace(as_store(store), ttl_s=TTL_S)
    listing = await namespace.entries("dir/")
    await trio.sleep(TTL_S / 4)
    assert namespace.believed("dir/", listing)(b"a") == pytest.approx(TTL_S * 3 / 4)

    namespace.mark_outdated("dir/b")
    left = namespace.believed("dir/", listing)
    assert left(b"a") == pytest.approx(TTL_S * 3 / 4)
    assert left(b"b") == 0.0

    namespace.expire("dir/")
    await namespace.entries("dir/")
    assert namespace.believed("dir/", listing)(b"a") == 0.0


@pytest.mark.parametrize("ttl_s", [0.5, TTL_S])
async def test_a_listing_that_is_about_to_expire_is_requested_anew(autojump_clock: MockClock, ttl_s: float) -> None:
    """Else the kernel would ask for each name at once, or use the names for longer than it may."""
    store = MemoryStore({"dir/a": b"a"})
    namespace = Namespace(as_store(store), ttl_s=ttl_s)
    old, spare_s = await namespace.entries("dir/"), min(LISTED_TTL_S, ttl_s / 2)
    await trio.sleep(ttl_s - spare_s * 1.1)
    assert await namespace.entries("dir/") is old
    await trio.sleep(spare_s * 0.2)
    assert namespace.believed("dir/", old)(b"a") == pytest.approx(spare_s * 0.9)
    new = await namespace.entries("dir/")
    assert new is not old
    assert namespace.believed("dir/", new)(b"a") == pytest.approx(ttl_s)
