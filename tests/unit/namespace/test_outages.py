"""While a store does not answer, what it has said last counts: presence at once, absence once nobody asks any more."""

import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.support.parts import until
from tests.support.stores import MemoryStore, as_store
from tests.unit.namespace.common import TTL_S, a_generation, look
from trimsfs.errors import StoreUnavailableError, TransientStoreError
from trimsfs.namespace.directory import STALE_RETRY_S
from trimsfs.namespace.inquiries import PATIENCE_S
from trimsfs.namespace.kept_listings import KeptListings, packed, unpacked
from trimsfs.namespace.lifetimes import ABSENT_AFTER_S
from trimsfs.namespace.listing import SLICE, Entry, NonObject
from trimsfs.namespace.tree import Namespace
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.stores.retrying import Retrying, RetryingStore
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.index.listing_records import ListingRecords
from trimsfs.tiers.threads import Threads
from trimsfs.types import Generation, Symlink

DEADLINE_S = 15.0
STALE_FOR_S = 600.0


@asynccontextmanager
async def serving(store: MemoryStore, *, kept: KeptListings | None = None) -> AsyncIterator[Namespace]:
    """A namespace as a server has it."""
    breaker = CircuitBreaker(deadline_s=DEADLINE_S)
    retrying = Retrying(deadline_s=DEADLINE_S, on_failure=None, breaker=breaker)
    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.run, as_store(store).probe)
        if kept is not None:
            await nursery.start(kept.run)
        yield Namespace(
            RetryingStore(as_store(store), retrying),
            ttl_s=TTL_S,
            stale_for_s=STALE_FOR_S,
            impatient=as_store(store),
            breaker=breaker,
            kept=kept,
        )
        nursery.cancel_scope.cancel()


def fails(store: MemoryStore, how: str) -> None:
    """The store refuses all requests, or answers none."""
    if how == "refuses":
        store.fail(TransientStoreError("503"), times=float("inf"))
    else:
        store.delay(1e9)


OUTAGES = pytest.mark.parametrize("how", ["refuses", "hangs"])


async def took(namespace: Namespace, path: str) -> tuple[Entry | StoreUnavailableError, float]:
    """What comes of a lookup, and how long it takes."""
    began = trio.current_time()
    found: Entry | StoreUnavailableError
    try:
        found = await look(namespace, path)
    except StoreUnavailableError as error:
        found = error
    return found, trio.current_time() - began


@OUTAGES
async def test_what_is_there_is_told_at_once(store: MemoryStore, how: str, autojump_clock: MockClock) -> None:
    async with serving(store) as namespace:
        known = await look(namespace, "a")
        await trio.sleep(TTL_S)
        fails(store, how)
        waits = list[float]()
        for _ in range(600):
            found, wait = await took(namespace, "a")
            assert found == known
            waits.append(wait)
            await trio.sleep(0.5)
        assert waits[0] <= PATIENCE_S
        assert sum(waits) <= 2 * PATIENCE_S, "the server asks, nobody waits"


@OUTAGES
async def test_a_listing_tells_what_is_absent_once_nothing_was_answered_for_a_while(
    store: MemoryStore, how: str, autojump_clock: MockClock
) -> None:
    async with serving(store) as namespace:
        await namespace.entries("")
        await trio.sleep(TTL_S)
        fails(store, how)
        found, wait = await took(namespace, "absent")
        assert found is NonObject.ABSENT
        assert wait == pytest.approx(ABSENT_AFTER_S, abs=0.1)
        for number in range(100):
            assert await took(namespace, f"absent-{number}") == (NonObject.ABSENT, 0)
            assert await took(namespace, "a") == (store.generation("a"), 0)
            assert await took(namespace, "dir") == (NonObject.DIRECTORY, 0)
            assert list(await namespace.entries("")) == [b"a", b"b", b"dir"]
            await trio.sleep(1)


async def test_a_passing_failure_makes_no_name_absent(store: MemoryStore, autojump_clock: MockClock) -> None:
    async with serving(store) as namespace:
        await namespace.entries("")
        store.put("new", b"uploaded")
        for _ in range(20):
            await trio.sleep(TTL_S)
            store.fail(TransientStoreError("503"), times=2)
            assert await look(namespace, "a") == store.generation("a")
            assert await look(namespace, "new") == store.generation("new")


async def test_what_was_never_listed_is_not_told_absent_and_fails_at_once(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    async with serving(store) as namespace:
        await namespace.entries("")
        fails(store, "refuses")
        await trio.sleep(TTL_S)
        waits = list[float]()
        for number in range(30):
            found, wait = await took(namespace, f"dir/{number}")
            assert isinstance(found, StoreUnavailableError)
            waits.append(wait)
            await trio.sleep(1)
        assert waits == [pytest.approx(DEADLINE_S, abs=0.1), *[0] * 29]


async def test_names_of_a_large_directory_that_were_asked_for_count(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    async with serving(large_store) as namespace:
        assert await look(namespace, "large/absent") is NonObject.ABSENT
        assert await look(namespace, "large/000001") == large_store.generation("large/000001")
        await trio.sleep(TTL_S)
        fails(large_store, "refuses")
        assert isinstance((await took(namespace, "large/other"))[0], StoreUnavailableError)
        assert await took(namespace, "large/absent") == (NonObject.ABSENT, 0)
        assert await took(namespace, "large/000001") == (large_store.generation("large/000001"), 0)
        assert isinstance((await took(namespace, "large/other"))[0], StoreUnavailableError)


async def test_it_counts_for_so_long_and_no_longer(store: MemoryStore, autojump_clock: MockClock) -> None:
    async with serving(store) as namespace:
        await namespace.entries("")
        fails(store, "refuses")
        await trio.sleep(STALE_FOR_S - 2 * DEADLINE_S)
        assert (await took(namespace, "absent"))[0] is NonObject.ABSENT
        assert await took(namespace, "a") == (store.generation("a"), 0)
        await trio.sleep(2 * DEADLINE_S)
        for name in ("absent", "a"):
            assert isinstance((await took(namespace, name))[0], StoreUnavailableError)
        with pytest.raises(StoreUnavailableError):
            await namespace.entries("")


async def test_the_store_counts_again_as_soon_as_it_answers(store: MemoryStore, autojump_clock: MockClock) -> None:
    async with serving(store) as namespace:
        await namespace.entries("")
        fails(store, "refuses")
        await trio.sleep(TTL_S)
        await took(namespace, "absent")
        store.heal()
        store.put("absent", b"uploaded")
        store.delete("b")
        await trio.sleep(STALE_RETRY_S)
        assert await look(namespace, "absent") == store.generation("absent")
        assert await look(namespace, "b") is NonObject.ABSENT


async def test_a_slow_store_is_waited_for_in_the_end(store: MemoryStore, autojump_clock: MockClock) -> None:
    """One that always takes longer than the patience of who has an old answer would never be heard."""
    async with serving(store) as namespace:
        await namespace.entries("")
        store.delay(2.5 * PATIENCE_S)
        store.put("a", b"another content")
        for _ in range(4):
            await trio.sleep(TTL_S)
            await look(namespace, "a")
        assert await look(namespace, "a") == store.generation("a")


async def test_what_was_replaced_is_asked_for_and_else_what_is_known_counts(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    async with serving(store) as namespace:
        known = await look(namespace, "a")
        assert isinstance(known, Generation)
        namespace.replaced(known)
        fails(store, "refuses")
        found, wait = await took(namespace, "a")
        assert found == known
        assert wait == pytest.approx(DEADLINE_S, abs=0.1)
        assert await took(namespace, "a") == (known, 0)
        assert await took(namespace, "absent") == (NonObject.ABSENT, 0)


# Listings of earlier servers


@pytest.fixture
def index(tmp_path: Path) -> BlobIndex:
    return BlobIndex(tmp_path / "index.sqlite")


def kept_in(index: BlobIndex, store: str = "memory://test") -> KeptListings:
    return KeptListings(ListingRecords(index, Threads(2), store))


def recorded(index: BlobIndex) -> int:
    """Of how many directories the listing is recorded."""
    with index.transaction() as connection:
        ((count,),) = connection.execute("SELECT count(*) FROM listings")
    return int(count)


async def test_the_next_server_knows_what_the_last_one_has_listed(store: MemoryStore, index: BlobIndex) -> None:
    async with serving(store, kept=kept_in(index)) as namespace:
        before = dict(await namespace.entries(""))
        assert await look(namespace, "dir/c") == store.generation("dir/c")
        await until(lambda: recorded(index) == 2)
    store.fail(StoreUnavailableError("the store is down"), times=float("inf"))
    async with serving(store, kept=kept_in(index)) as namespace:
        assert await look(namespace, "a") == before[b"a"]
        assert await look(namespace, "dir/c") == store.generation("dir/c")
        assert await namespace.entries("") == before
    async with serving(store, kept=kept_in(index, "memory://another")) as namespace:
        with pytest.raises(StoreUnavailableError):
            await namespace.entries("")


async def test_the_next_server_asks_first(store: MemoryStore, index: BlobIndex) -> None:
    async with serving(store, kept=kept_in(index)) as namespace:
        await namespace.entries("")
        await until(lambda: recorded(index) == 1)
    store.put("a", b"another content")
    store.delete("b")
    async with serving(store, kept=kept_in(index)) as namespace:
        assert await look(namespace, "a") == store.generation("a")
        assert list(await namespace.entries("")) == [b"a", b"dir"]


ENTRIES: dict[bytes, Entry] = {
    b"a": a_generation("p/a"),
    "é".encode(): a_generation("p/é"),
    b"below": NonObject.DIRECTORY,
    b"closed": NonObject.UNREADABLE,
    b"link": replace(a_generation("p/link"), linked="p/a"),
    b"symlink": Symlink(key="p/symlink", target="v1"),
    b"\xff": a_generation("p/\udcff"),
}


async def test_a_record_has_all_of_a_listing() -> None:
    assert dict(await unpacked("p/", packed(ENTRIES)) or {}) == ENTRIES
    assert list(await unpacked("p/", packed(ENTRIES)) or ()) == sorted(ENTRIES)
    many: dict[bytes, Entry] = {b"%06d" % number: a_generation(f"p/{number:06}") for number in range(3 * SLICE)}
    assert dict(await unpacked("p/", packed(many)) or {}) == many


async def test_a_record_of_an_earlier_version_is_understood() -> None:
    record = json.dumps([["below"], ["a", '"x"', 1, 0, None, None]]).encode()
    entries = dict(await unpacked("p/", zlib.compress(record)) or {})
    assert entries == {b"a": a_generation("p/a"), b"below": NonObject.DIRECTORY}


@pytest.mark.parametrize("damaged", range(0, 90, 7))
async def test_a_damaged_record_counts_for_nothing_or_is_right(damaged: int) -> None:
    record = bytearray(packed(ENTRIES))
    record[damaged % len(record)] ^= 0xFF
    assert await unpacked("p/", bytes(record)) in (None, ENTRIES)
    assert await unpacked("p/", packed(ENTRIES)[: damaged % len(record)]) is None


def test_of_too_many_listings_the_oldest_are_forgotten(index: BlobIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.tiers.index.listing_records.MOST_BYTES", 250)

    async def record() -> list[bool]:
        records = ListingRecords(index, Threads(1), "memory://test")
        for number in range(5):
            await records.record(f"{number}/", lambda: bytes(100))
        return [await records.last(f"{number}/") is not None for number in range(5)]

    assert trio.run(record) == [False, False, False, True, True]


def test_what_a_record_takes_to_be_written_does_not_grow_with_their_number(index: BlobIndex) -> None:
    async def steps(records: ListingRecords, number: int) -> int:
        """The steps of SQLite's virtual machine for one more record, in hundreds."""
        count = 0

        def stepped() -> None:
            nonlocal count
            count += 1

        with index.transaction() as connection:
            connection.set_progress_handler(stepped, 100)
        await records.record(f"{number}/", lambda: bytes(100))
        with index.transaction() as connection:
            connection.set_progress_handler(None, 0)
        return count

    async def record() -> None:
        records = ListingRecords(index, Threads(1), "memory://test")
        for number in range(2000):
            await records.record(f"{number}/", lambda: bytes(100))
        assert await steps(records, 2000) < 10

    trio.run(record)
