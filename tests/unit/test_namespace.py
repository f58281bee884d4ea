import logging
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from tests.fakes import MemoryStore, Request, as_store
from trimsfs.errors import (
    NoSuchEntryError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.names import STALE_RETRY_S, Special, possible
from trimsfs.namespace import NEGATIVE_TTL_S, ROOT_INODE, Kind, Namespace
from trimsfs.stores import Retrying, RetryingStore
from trimsfs.stores.base import PAGE_LIMIT, Page
from trimsfs.types import ETAG_MAX, SIZE_MAX, Generation

TTL_S = 60.0


def down() -> StoreUnavailableError:
    """What a store says that cannot be reached."""
    return StoreUnavailableError("the store is down")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"a": b"content of a", "b": b"content of b", "dir/c": b"content of c"})


@pytest.fixture
def large_store() -> MemoryStore:
    """A store with one directory more than a page can hold."""
    return MemoryStore({f"large/{number:06}": b"%d" % number for number in range(PAGE_LIMIT + 1)})


def namespace_of(store: MemoryStore, *, ttl_s: float = TTL_S) -> Namespace:
    return Namespace(as_store(store), ttl_s=ttl_s)


async def look(namespace: Namespace, path: str) -> Generation | Special:
    """What a path is."""
    prefix, slash, name = path.rpartition("/")
    entry, left = await namespace.lookup(prefix + slash, name.encode())
    assert left > 0
    return entry


# Lazily, with as few requests as possible


async def test_nothing_is_asked_before_a_lookup(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace_of(store)
    await trio.sleep(1000)
    assert store.requests == []


async def test_siblings_cost_one_request(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    assert await look(namespace, "a") == store.generation("a")
    assert await look(namespace, "b") == store.generation("b")
    assert await look(namespace, "dir") is Special.DIRECTORY
    assert await look(namespace, "absent") is Special.ABSENT
    assert list(await namespace.entries("")) == [b"a", b"b", b"dir"]
    assert [(request.method, request.key) for request in store.requests] == [("list_page", "")]


async def test_siblings_looked_up_at_once_cost_one_request(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "dir", "absent", "x", "y", "z"):
            nursery.start_soon(look, namespace, name)
        nursery.start_soon(namespace.entries, "")
    assert len(store.requests) == 1


async def test_directory_is_listed_when_it_is_looked_into(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    await look(namespace, "dir")
    assert store.count("list_page", "dir/") == 0
    assert await look(namespace, "dir/c") == store.generation("dir/c")
    assert store.count("list_page", "dir/") == 1
    assert namespace.statistics().directories == 2


async def test_cancelled_lookup_leaves_nothing_locked(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    store.block(method="list_page")
    with trio.move_on_after(1) as scope:
        await look(namespace, "a")
    assert scope.cancelled_caught
    store.heal()
    assert await look(namespace, "a") == store.generation("a")


# How long names are believed


async def test_names_are_believed_until_their_time_is_over(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    old = await look(namespace, "a")
    store.put("a", b"other content")
    store.delete("b")

    await trio.sleep(TTL_S - 0.25)
    assert await look(namespace, "a") == old
    assert isinstance(await look(namespace, "b"), Generation)
    await trio.sleep(0.25)
    assert await look(namespace, "a") == store.generation("a") != old
    assert await look(namespace, "b") is Special.ABSENT
    assert store.count("list_page") == 2


async def test_time_that_is_told_is_what_is_left(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    assert (await namespace.lookup("", b"a"))[1] == TTL_S
    await trio.sleep(TTL_S / 3)
    assert (await namespace.lookup("", b"a"))[1] == pytest.approx(TTL_S * 2 / 3)
    assert (await namespace.lookup("", b"absent"))[1] <= NEGATIVE_TTL_S


async def test_time_of_a_slow_listing_counts_from_its_beginning(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    store.delay(TTL_S / 4, method="list_page")
    assert (await namespace.lookup("", b"a"))[1] == pytest.approx(TTL_S * 3 / 4)


@pytest.mark.parametrize("ttl_s", [TTL_S, 2.0])
async def test_absence_is_believed_for_a_short_time_only(
    store: MemoryStore, ttl_s: float, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store, ttl_s=ttl_s)
    negative_ttl_s = min(ttl_s, NEGATIVE_TTL_S)
    for name in ("new", "newer"):
        entry, left = await namespace.lookup("", name.encode())
        assert (entry, left) == (Special.ABSENT, negative_ttl_s)
        store.put(name, b"uploaded")

        await trio.sleep(negative_ttl_s - 0.25)
        assert await look(namespace, name) is Special.ABSENT
        await trio.sleep(0.25)
        assert await look(namespace, name) == store.generation(name)


async def test_asking_again_for_an_absent_name_does_not_list_the_directory_again(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    for _ in range(5):
        assert await look(namespace, "absent") is Special.ABSENT
        await trio.sleep(NEGATIVE_TTL_S)
    assert store.count("list_page", "") == 1
    assert store.count("stat", "absent") == 4


async def test_directory_made_after_the_listing_is_found(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    await look(namespace, "new")
    store.put("new/model", b"uploaded")
    await trio.sleep(NEGATIVE_TTL_S)
    assert await look(namespace, "new") is Special.DIRECTORY


async def test_without_time_to_live_every_lookup_asks(store: MemoryStore) -> None:
    namespace = namespace_of(store, ttl_s=0)
    for content in (b"one", b"two", b"three"):
        store.put("a", content)
        entry, left = await namespace.lookup("", b"a")
        assert (entry, left) == (store.generation("a"), 0)
    store.delete("a")
    assert (await namespace.lookup("", b"a"))[0] is Special.ABSENT


async def test_replaced_object_is_asked_for_at_the_next_lookup(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    for key in ("a", "dir/c"):
        old = await look(namespace, key)
        store.put(key, b"other content")
        assert await look(namespace, key) == old
        namespace.replaced(key)
        assert await look(namespace, key) == store.generation(key)
    namespace.replaced("never/looked/into")


# The store fails


async def test_failure_is_not_told_as_absence(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    store.fail(down(), times=float("inf"))
    for name in ("a", "absent", "dir"):
        with pytest.raises(StoreUnavailableError):
            await look(namespace, name)
        with pytest.raises(StoreUnavailableError):
            await namespace.entries("")
    store.heal()
    await trio.sleep(STALE_RETRY_S)
    assert await look(namespace, "a") == store.generation("a")
    assert await look(namespace, "absent") is Special.ABSENT


@pytest.mark.parametrize("method", ["stat", "list_page"])
async def test_failure_to_ask_for_one_name_is_not_told_as_absence(
    store: MemoryStore, method: str, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    await look(namespace, "new")
    store.put("new", b"uploaded")
    await trio.sleep(NEGATIVE_TTL_S)
    store.fail(down(), method=method)
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "new")
    await trio.sleep(STALE_RETRY_S)
    assert await look(namespace, "new") == store.generation("new")


async def test_failure_of_both_requests_for_a_name_is_told_as_one(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    await look(namespace, "new")
    await trio.sleep(NEGATIVE_TTL_S)
    store.fail(down(), times=2)
    with pytest.raises(StoreUnavailableError, match="the store is down"):
        await look(namespace, "new")


async def test_store_that_is_down_is_not_asked_again_at_once(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    store.delay(15)
    store.fail(down(), times=float("inf"))
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "a")

    began = trio.current_time()
    for name in ("a", "b", "absent") * 10:
        with pytest.raises(StoreUnavailableError):
            await look(namespace, name)
    assert trio.current_time() == began
    assert len(store.requests) == 1


async def test_callers_that_wait_for_a_store_that_is_down_share_one_failure(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    store.delay(15)
    store.fail(down(), times=float("inf"))

    async def fail() -> None:
        with pytest.raises(StoreUnavailableError):
            await look(namespace, "a")

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(fail)
    assert trio.current_time() == 15
    assert len(store.requests) == 1


async def test_store_that_recovers_is_noticed_however_often_it_is_asked_for(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    store.fail(down(), times=float("inf"))
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "a")
    store.heal()
    found = []
    for _ in range(100):
        await trio.sleep(STALE_RETRY_S / 10)
        with suppress(StoreUnavailableError):
            found.append(await look(namespace, "a"))
    assert len(found) >= 90


async def test_absent_name_is_asked_for_again_when_the_store_recovers_however_often(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    await look(namespace, "new")
    await trio.sleep(TTL_S)
    store.fail(down(), times=float("inf"))
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "new")
    store.heal()
    store.put("new", b"uploaded")
    found = []
    for _ in range(20):
        await trio.sleep(STALE_RETRY_S / 10)
        with suppress(StoreUnavailableError):
            found.append(await look(namespace, "new"))
    assert found
    assert set(found) == {store.generation("new")}


async def test_known_names_are_served_while_the_store_is_down(
    store: MemoryStore, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    entries = dict(await namespace.entries(""))
    store.fail(down(), times=float("inf"))
    await trio.sleep(TTL_S)

    for _ in range(100):
        entry, left = await namespace.lookup("", b"a")
        assert entry == entries[b"a"]
        assert 0 < left <= STALE_RETRY_S
        assert await look(namespace, "dir") is Special.DIRECTORY
        assert await namespace.entries("") == entries
        await trio.sleep(1)
    assert store.count("list_page") <= 2 + 100 / STALE_RETRY_S
    assert any("the store is down" in record.message for record in caplog.records if record.levelno >= logging.WARNING)


async def test_unknown_names_are_not_told_absent_while_the_store_is_down(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    assert await look(namespace, "absent") is Special.ABSENT
    store.fail(down(), times=float("inf"))
    await trio.sleep(TTL_S)
    assert await look(namespace, "a") == store.generation("a")
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            await look(namespace, "absent")
        await trio.sleep(1)


async def test_one_attempt_that_fails_is_no_failure_for_names_that_are_not_known(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    """Known names do not wait for a store that may be down, and so it is asked for them but once."""
    namespace = Namespace(
        RetryingStore(as_store(store), Retrying(deadline_s=15)), ttl_s=TTL_S, impatient=as_store(store)
    )
    assert await look(namespace, "new") is Special.ABSENT
    store.put("new", b"uploaded")
    await trio.sleep(TTL_S)
    store.fail(TransientStoreError("reset"), times=3)
    assert await look(namespace, "a") == store.generation("a")
    assert await look(namespace, "new") == store.generation("new")
    store.fail(TransientStoreError("reset"), times=float("inf"))
    began = trio.current_time()
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "other")
    assert trio.current_time() - began > 14.9
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "another")
    assert trio.current_time() - began < 15 + STALE_RETRY_S


async def test_what_is_known_to_be_replaced_is_asked_for_though_an_attempt_has_failed(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    """While the store seems to be down, names are believed for longer; not one that has just been found outdated."""
    namespace = Namespace(
        RetryingStore(as_store(store), Retrying(deadline_s=15)), ttl_s=TTL_S, impatient=as_store(store)
    )
    known = await look(namespace, "a")
    await trio.sleep(TTL_S)
    store.fail(down())
    assert await look(namespace, "a") == known
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "absent")
    store.put("a", b"another content")
    store.delete("b")
    for key in ("a", "b"):
        namespace.replaced(key)
    store.fail(TransientStoreError("reset"), times=2)
    assert await look(namespace, "a") == store.generation("a")
    assert await look(namespace, "b") is Special.ABSENT
    store.fail(down(), times=float("inf"))
    namespace.replaced("a")
    assert await look(namespace, "a") == known  # better than nothing: its content may be here


async def test_a_doubtful_name_alone_is_asked_for(
    store: MemoryStore, large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    for objects, key in ((store, "a"), (large_store, "large/000001")):
        namespace = namespace_of(objects)
        known = await look(namespace, key)
        await trio.sleep(1)
        objects.put(key, b"another content")
        asked = len(objects.requests)
        assert await look(namespace, key) == known
        namespace.doubt(key)
        await trio.sleep(1)
        for _ in range(3):
            assert await look(namespace, key) == objects.generation(key)
        assert len(objects.requests) == asked + 2
        namespace.doubt(key)
        objects.fail(down(), times=float("inf"))
        assert await look(namespace, key) == objects.generation(key)  # in doubt, but better than nothing


async def test_known_names_of_a_large_directory_do_not_wait_for_a_store_that_is_down(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = Namespace(
        RetryingStore(as_store(large_store), Retrying(deadline_s=15)),
        ttl_s=TTL_S,
        impatient=as_store(large_store),
    )
    known = await look(namespace, "large/000001")
    await trio.sleep(TTL_S)
    large_store.fail(TransientStoreError("reset"), times=float("inf"))
    asked, began = len(large_store.requests), trio.current_time()
    for _ in range(10):
        assert await look(namespace, "large/000001") == known
    assert trio.current_time() == began
    assert len(large_store.requests) <= asked + 2


async def test_new_listing_is_shown_soon_after_the_store_recovers(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    await namespace.entries("")
    store.fail(down(), times=float("inf"))
    await trio.sleep(TTL_S)
    await look(namespace, "a")
    store.heal()
    store.put("a", b"other content")
    store.delete("b")
    await trio.sleep(STALE_RETRY_S)
    assert await look(namespace, "a") == store.generation("a")
    assert list(await namespace.entries("")) == [b"a", b"dir"]


async def test_failure_in_one_directory_leaves_the_others_alone(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    store.fail(StoreAccessError("not allowed"), times=float("inf"), key="dir/")
    with pytest.raises(StoreAccessError):
        await look(namespace, "dir/c")
    assert await look(namespace, "a") == store.generation("a")


# Directories too large to be listed for a lookup


async def test_name_in_a_large_directory_is_asked_for_without_listing_it(large_store: MemoryStore) -> None:
    namespace = namespace_of(large_store)
    for number in (0, PAGE_LIMIT, 500):
        key = f"large/{number:06}"
        assert await look(namespace, key) == large_store.generation(key)
    assert await look(namespace, "large/absent") is Special.ABSENT
    assert large_store.count("list_page", "large/") == 1
    assert large_store.count("stat") == 4


async def test_names_in_a_large_directory_looked_up_at_once_list_it_once(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    large_store.delay(1)
    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(look, namespace, f"large/{number:06}")
    assert large_store.count("list_page", "large/") == 1
    assert trio.current_time() == 2


async def test_directory_as_large_as_a_page_is_listed() -> None:
    store = MemoryStore({f"large/{number:06}": b"" for number in range(PAGE_LIMIT)})
    namespace = namespace_of(store)
    for number in range(PAGE_LIMIT):
        await look(namespace, f"large/{number:06}")
    assert len(store.requests) == 1


async def test_name_in_a_large_directory_is_believed_as_long_as_any(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    key = "large/000007"
    old = await look(namespace, key)
    assert await look(namespace, "large/new") is Special.ABSENT
    large_store.put(key, b"other content")
    large_store.put("large/new", b"uploaded")

    await trio.sleep(NEGATIVE_TTL_S)
    assert await look(namespace, "large/new") == large_store.generation("large/new")
    await trio.sleep(TTL_S - NEGATIVE_TTL_S - 0.25)
    assert await look(namespace, key) == old
    await trio.sleep(0.25)
    assert await look(namespace, key) == large_store.generation(key) != old


async def test_replaced_object_of_a_large_directory_is_asked_for(large_store: MemoryStore) -> None:
    namespace = namespace_of(large_store)
    key = "large/000007"
    for listed in (False, True):
        if listed:
            await namespace.entries("large/")
        await look(namespace, key)
        large_store.put(key, b"other content %d" % listed)
        namespace.replaced(key)
        assert await look(namespace, key) == large_store.generation(key)


async def test_only_so_many_names_of_a_large_directory_are_remembered(
    large_store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.namespace.KNOWN_NAMES", 10)
    namespace = namespace_of(large_store)
    for number in range(11):
        await look(namespace, f"large/{number:06}")
    asked = large_store.count("stat")
    for number in range(1, 11):
        await look(namespace, f"large/{number:06}")
    assert large_store.count("stat") == asked
    await look(namespace, "large/000000")
    assert large_store.count("stat") == asked + 1


async def test_names_of_a_large_directory_asked_for_longest_ago_are_forgotten_first(
    large_store: MemoryStore, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("trimsfs.namespace.KNOWN_NAMES", 2)
    namespace = namespace_of(large_store)
    await look(namespace, "large/000001")
    await look(namespace, "large/000002")
    await trio.sleep(TTL_S)
    await look(namespace, "large/000001")
    await look(namespace, "large/000003")
    asked = large_store.count("stat")
    await look(namespace, "large/000001")
    assert large_store.count("stat") == asked
    await look(namespace, "large/000002")
    assert large_store.count("stat") == asked + 1


async def test_large_directory_is_listed_whole_for_its_entries_and_then_lookups_ask_nothing(
    large_store: MemoryStore,
) -> None:
    namespace = namespace_of(large_store)
    await look(namespace, "large/000007")
    assert list(await namespace.entries("large/")) == [b"%06d" % number for number in range(PAGE_LIMIT + 1)]
    asked = len(large_store.requests)
    for number in range(PAGE_LIMIT + 1):
        assert isinstance(await look(namespace, f"large/{number:06}"), Generation)
    assert await look(namespace, "large/absent") is Special.ABSENT
    assert len(large_store.requests) == asked


async def test_listing_that_fails_half_way_shows_nothing_of_it(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    large_store.delay(1, method="list_page")

    async def fail() -> None:
        with pytest.raises(StoreUnavailableError):
            await namespace.entries("large/")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await trio.sleep(0.5)
        large_store.fail(down(), method="list_page")
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "large/000000")
    await trio.sleep(STALE_RETRY_S)
    assert len(await namespace.entries("large/")) == PAGE_LIMIT + 1


async def test_directory_that_grows_large_is_no_longer_listed_for_a_lookup(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    await look(namespace, "dir/c")
    for number in range(PAGE_LIMIT):
        store.put(f"dir/{number:06}", b"")
    await trio.sleep(TTL_S)
    for number in range(10):
        assert isinstance(await look(namespace, f"dir/{number:06}"), Generation)
    assert store.count("list_page", "dir/") == 2


async def test_failure_to_ask_for_a_name_of_a_large_directory(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    known = await look(namespace, "large/000007")
    large_store.fail(down(), times=float("inf"))

    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await look(namespace, "large/000008")
        assert await look(namespace, "large/000007") == known
    await trio.sleep(TTL_S)
    asked = len(large_store.requests)
    for _ in range(10):
        assert await look(namespace, "large/000007") == known
    assert len(large_store.requests) - asked <= 2
    large_store.heal()
    await trio.sleep(STALE_RETRY_S)
    assert await look(namespace, "large/000008") == large_store.generation("large/000008")


async def test_newest_that_is_known_is_served_while_the_store_is_down(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    await namespace.entries("large/")
    large_store.put("large/000007", b"other content")
    await trio.sleep(TTL_S)
    newest = await look(namespace, "large/000007")
    assert newest == large_store.generation("large/000007")
    large_store.fail(down(), times=float("inf"))
    await trio.sleep(TTL_S)
    assert await look(namespace, "large/000007") == newest


async def test_deleted_name_does_not_come_back_while_the_store_is_down(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    large_store.put("large/more", b"so that it stays large")
    namespace = namespace_of(large_store)
    await namespace.entries("large/")
    large_store.delete("large/000007")
    await trio.sleep(TTL_S)
    for _ in range(2):
        assert await look(namespace, "large/000007") is Special.ABSENT
        await trio.sleep(NEGATIVE_TTL_S)
    large_store.fail(down(), times=float("inf"))
    with pytest.raises(StoreUnavailableError):
        await look(namespace, "large/000007")


async def test_object_that_is_refused_does_not_keep_its_neighbours_from_being_found(large_store: MemoryStore) -> None:
    namespace = namespace_of(large_store)
    large_store.fail(StoreAccessError("not allowed"), times=float("inf"), method="stat", key="large/000007")
    with pytest.raises(StoreAccessError):
        await look(namespace, "large/000007")
    assert await look(namespace, "large/000008") == large_store.generation("large/000008")


# Keys that are no file names


async def test_directory_wins_over_an_object_of_its_name(store: MemoryStore) -> None:
    store.put("dir", b"an object")
    namespace = namespace_of(store)
    assert await look(namespace, "dir") is Special.DIRECTORY
    assert (await namespace.entries(""))[b"dir"] is Special.DIRECTORY
    assert await look(namespace, "dir/c") == store.generation("dir/c")
    assert namespace.statistics().hidden_keys == 1


async def test_directory_wins_over_an_object_of_its_name_in_a_large_directory(large_store: MemoryStore) -> None:
    large_store.put("large/both", b"an object")
    large_store.put("large/both/below", b"an object")
    namespace = namespace_of(large_store)
    assert await look(namespace, "large/both") is Special.DIRECTORY
    assert (await namespace.entries("large/"))[b"both"] is Special.DIRECTORY


IMPOSSIBLE = (
    ".",
    "..",
    ".trims",
    "n" * 256,
    "ü" * 128,
    "nul\0",
    "/slash",
    "./below",
    "../below",
    ".trims/below",
    f"{'d' * 256}/below",
)


async def test_keys_that_cannot_be_names_are_hidden_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    possible_keys = ("n" * 255, ".hidden", "...", ".trims2", "ü" * 127, " ", "new\nline", "~")
    store = MemoryStore({f"dir/{key}": b"" for key in (*IMPOSSIBLE, *possible_keys)})
    namespace = namespace_of(store)

    assert set(await namespace.entries("dir/")) == {key.encode() for key in possible_keys}
    # "." and "./below" are two, ".." and ".trims" likewise.
    assert namespace.statistics().hidden_keys == len(IMPOSSIBLE)
    assert any("dir/" in record.message for record in caplog.records if record.levelno >= logging.WARNING)
    for key in possible_keys:
        assert await look(namespace, f"dir/{key}") == store.generation(f"dir/{key}")


async def test_empty_segment_of_a_key_is_hidden_and_does_not_hide_its_neighbour() -> None:
    store = MemoryStore({"a//b": b"", "a/b": b"", "//c": b""})
    namespace = namespace_of(store)
    assert list(await namespace.entries("")) == [b"a"]
    assert list(await namespace.entries("a/")) == [b"b"]
    assert namespace.statistics().hidden_keys == 2


async def test_hidden_keys_are_counted_anew_with_each_listing(autojump_clock: MockClock) -> None:
    store = MemoryStore({"..": b"", ".": b""})
    namespace = namespace_of(store)
    for hidden in (2, 2, 1):
        if hidden == 1:
            store.delete(".")
        await namespace.entries("")
        assert namespace.statistics().hidden_keys == hidden
        await trio.sleep(TTL_S)


@pytest.mark.parametrize("name", [b"", b".", b"..", b".trims", b"n" * 256, b"nul\0", b"a/b", b"/"])
async def test_impossible_name_is_absent_without_asking(store: MemoryStore, name: bytes) -> None:
    assert not possible(name)
    namespace = namespace_of(store)
    assert (await namespace.lookup("", name))[0] is Special.ABSENT
    assert store.requests == []


async def test_name_that_is_not_utf8_is_asked_for_as_it_is(large_store: MemoryStore) -> None:
    large_store.put("large/\udce9t\udce9", b"latin-1")
    namespace = namespace_of(large_store)
    entry, _ = await namespace.lookup("large/", b"\xe9t\xe9")
    assert entry == large_store.generation("large/\udce9t\udce9")
    assert b"\xe9t\xe9" in await namespace.entries("large/")


# Inodes


def a_generation(key: str, etag: str = '"x"') -> Generation:
    return Generation(key=key, etag=etag, size=1, modified_ns=0)


THINGS = (
    (Kind.DIRECTORY, "a/", None, ""),
    (Kind.OBJECT, "a/", a_generation("a/"), ""),
    (Kind.OBJECT, "a", a_generation("a"), ""),
    (Kind.OBJECT, "a", a_generation("a", '"y"'), ""),
    (Kind.CONTROL_DIRECTORY, "", None, ""),
    (Kind.CONTROL_DIRECTORY, "a/", None, ""),
    (Kind.CONTROL_DIRECTORY, "a", a_generation("a"), "subject"),
    (Kind.CONTROL_FILE, "a", a_generation("a"), "info"),
    (Kind.CONTROL_FILE, "a", a_generation("a"), "evict"),
    (Kind.OBJECT, "latin1-\udce9", a_generation("latin1-\udce9"), ""),
)


def test_inode_numbers_are_the_same_in_every_namespace() -> None:
    here, there = (namespace_of(MemoryStore(), ttl_s=ttl_s) for ttl_s in (1, 2))
    numbers = [here.reference(*thing).number for thing in THINGS]
    assert [there.reference(*thing).number for thing in reversed(THINGS)] == numbers[::-1]
    assert len(set(numbers)) == len(numbers)
    assert all(ROOT_INODE < number < 1 << 63 for number in numbers)


def test_one_thing_has_one_inode() -> None:
    namespace = namespace_of(MemoryStore())
    first, again = ([namespace.reference(*thing) for thing in THINGS] for _ in range(2))
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert namespace.statistics().inodes == len(first) + 1
    for inode in first:
        assert namespace.inode(inode.number) is inode


def test_root_is_always_there() -> None:
    namespace = namespace_of(MemoryStore())
    root = namespace.reference(Kind.DIRECTORY, "")
    assert root is namespace.inode(ROOT_INODE)
    namespace.forget(ROOT_INODE, 1000)
    namespace.discard(root)
    assert namespace.inode(ROOT_INODE) is root


def test_new_generation_has_a_new_number_and_the_old_one_keeps_its_own() -> None:
    namespace = namespace_of(MemoryStore())
    old = namespace.reference(Kind.OBJECT, "a", a_generation("a", '"1"'))
    new = namespace.reference(Kind.OBJECT, "a", a_generation("a", '"2"'))
    assert old.number != new.number
    assert namespace.inode(old.number).generation == a_generation("a", '"1"')
    assert namespace.inode(new.number).generation == a_generation("a", '"2"')


def test_inodes_whose_numbers_would_be_equal_get_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.namespace._INODE_BITS", 7)
    namespace = namespace_of(MemoryStore())
    inodes = [namespace.reference(Kind.DIRECTORY, f"{number}/") for number in range(80)]
    assert len({inode.number for inode in inodes}) == 80
    assert [inode.path for inode in inodes] == [f"{number}/" for number in range(80)]
    assert ROOT_INODE not in {inode.number for inode in inodes}
    for number, inode in enumerate(inodes):
        assert namespace.reference(Kind.DIRECTORY, f"{number}/") is inode


def test_inode_is_dropped_when_the_kernel_has_forgotten_it_as_often_as_it_was_told() -> None:
    namespace = namespace_of(MemoryStore())
    inode = namespace.reference(Kind.DIRECTORY, "a/")
    inode.lookups += 3
    namespace.forget(inode.number, 1)
    namespace.discard(inode)
    assert namespace.inode(inode.number) is inode
    namespace.forget(inode.number, 2)
    with pytest.raises(NoSuchEntryError):
        namespace.inode(inode.number)
    assert namespace.statistics().inodes == 1
    namespace.forget(inode.number, 1)


def test_inode_that_was_not_told_is_discarded() -> None:
    namespace = namespace_of(MemoryStore())
    inode = namespace.reference(Kind.DIRECTORY, "a/")
    namespace.discard(inode)
    with pytest.raises(NoSuchEntryError):
        namespace.inode(inode.number)


# Size


class _Shelf(MemoryStore):
    """A store of one directory that never changes, quick to page through."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._all = [a_generation(f"{number:06}") for number in range(size)]

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        async with self._serving(Request(method="list_page", key=prefix)):
            first = int(token or 0)
            last = first + min(limit, PAGE_LIMIT)
            objects = tuple(self._all[first:last])
            return Page(objects=objects, prefixes=(), next_token=str(last) if last < len(self._all) else None)


async def test_100_000_entries_are_listed_and_then_looked_up_without_a_request(autojump_clock: MockClock) -> None:
    store = _Shelf(100_000)
    namespace = namespace_of(store)
    began = time.monotonic()
    entries = await namespace.entries("")
    assert time.monotonic() - began < 10
    assert len(entries) == 100_000
    assert len(store.requests) == 100

    for number in range(0, 100_000, 7):
        assert await look(namespace, f"{number:06}") == a_generation(f"{number:06}")
    assert await look(namespace, "absent") is Special.ABSENT
    assert len(store.requests) == 100
    assert time.monotonic() - began < 15


async def test_errors_that_are_raised_again_do_not_grow(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    store.fail(down(), times=float("inf"))
    depths = []
    for _ in range(5):
        with pytest.raises(StoreError) as caught:
            await look(namespace, "a")
        depths.append(len(caught.traceback))
    assert depths[-1] <= depths[1]


async def test_a_new_name_is_found_before_the_listing_shows_it(store: MemoryStore, autojump_clock: MockClock) -> None:
    namespace = namespace_of(store)
    assert b"new" not in await namespace.entries("")
    await trio.sleep(NEGATIVE_TTL_S + 0.1)
    new = store.put("new", b"content of new")
    assert await look(namespace, "new") == new
    assert b"new" not in await namespace.entries("")
    await trio.sleep(TTL_S)
    assert b"new" in await namespace.entries("")


# Stores that lie


@pytest.mark.parametrize("named", [0, 10])
async def test_a_listing_without_a_last_page_is_given_up(named: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its pages name something or not."""
    monkeypatch.setattr("trimsfs.namespace.PAGES_LIMIT", 20)
    monkeypatch.setattr("trimsfs.namespace.ENTRIES_LIMIT", 150)
    store = MemoryStore()
    asked = 0

    async def list_page(prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        nonlocal asked
        asked += 1
        if prefix:
            return Page(objects=(), prefixes=(), next_token=None)
        made = tuple(Generation(key=f"{asked}-{n}", etag="e", size=1, modified_ns=0) for n in range(named))
        return Page(objects=made, prefixes=(), next_token=str(asked))

    monkeypatch.setattr(store, "list_page", list_page)
    namespace = namespace_of(store)
    with pytest.raises(StoreUnavailableError, match="too many to list"):
        await namespace.entries("")
    assert asked <= 21
    store.put("by name", b"content")
    assert await namespace.lookup("", b"by name") == (store.generation("by name"), TTL_S)


@pytest.mark.parametrize(
    ("etag", "size"),
    [("e", -1), ("e", SIZE_MAX + 1), ("", 1), ("e" * (ETAG_MAX + 1), 1), ("e\r\nX: y", 1), ("é", 1)],
)
async def test_what_can_be_no_object_is_hidden(etag: str, size: int) -> None:
    """Whether it is listed or asked for by name, and its neighbours are not."""
    store = MemoryStore({"good": b"content", "large/good": b"content"})
    lie = Generation(key="lie", etag=etag, size=size, modified_ns=0)
    store._current |= {"lie": lie, **{f"large/{n:04}": store.generation("good") for n in range(PAGE_LIMIT)}}
    store._current["large/lie"] = replace(lie, key="large/lie")
    namespace = namespace_of(store)
    assert list(await namespace.entries("")) == [b"good", b"large"]
    assert namespace.statistics().hidden_keys == 1
    for name in ("lie", "large/lie"):
        assert await look(namespace, name) is Special.ABSENT
    assert await look(namespace, "large/good") == store.generation("large/good")
