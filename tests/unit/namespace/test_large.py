"""Directories too large to be listed for a lookup, and listings without an end."""

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore, as_store
from tests.unit.namespace.common import TTL_S, a_generation, down, look, namespace_of
from trimsfs.errors import StoreAccessError, StoreError, StoreUnavailableError, TransientStoreError
from trimsfs.namespace.directory import LEAST_ASKED, STALE_RETRY_S
from trimsfs.namespace.inquiries import LONG_S
from trimsfs.namespace.lifetimes import NEGATIVE_TTL_S
from trimsfs.namespace.listing import NonObject
from trimsfs.namespace.tree import Namespace
from trimsfs.stores.base import MOST_NAMELESS, PAGE_LIMIT, Page
from trimsfs.stores.retrying import Retrying, RetryingStore
from trimsfs.types import ETAG_MAX, SIZE_MAX, Generation

# Directories too large to be listed for a lookup


async def test_name_in_a_large_directory_is_asked_for_without_listing_it(large_store: MemoryStore) -> None:
    namespace = namespace_of(large_store)
    for number in (0, PAGE_LIMIT, 500):
        key = f"large/{number:06}"
        assert await look(namespace, key) == large_store.generation(key)
    assert await look(namespace, "large/absent") is NonObject.ABSENT
    assert large_store.count("list_page", "large/") == 1
    assert large_store.count("stat") == 4


async def test_names_in_a_large_directory_looked_up_at_once_list_it_once(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    large_store.delay(1)
    async with trio.open_nursery() as nursery:
        for number in range(LEAST_ASKED - 1):
            nursery.start_soon(look, namespace, f"large/{number:06}")
    assert large_store.count("list_page", "large/") == 1
    assert trio.current_time() == 2


@pytest.mark.parametrize("pages", [2, 20])
async def test_a_large_directory_is_listed_once_for_many_of_its_names(pages: int, autojump_clock: MockClock) -> None:
    names = [f"large/{number:06}" for number in range(pages * PAGE_LIMIT)]
    store = MemoryStore(dict.fromkeys(names, b""))
    namespace = namespace_of(store)
    for _ in range(3):
        before = len(store.requests)
        for name in names[::10]:
            await look(namespace, name)
        assert len(store.requests) - before <= 3 * max(pages, LEAST_ASKED) + 2 * LEAST_ASKED
        await trio.sleep(TTL_S)


async def test_a_few_names_of_a_large_directory_now_and_then_do_not_list_it(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    for _ in range(5):
        for number in range(LEAST_ASKED - 1):
            await look(namespace, f"large/{number:06}")
        await trio.sleep(TTL_S + 1)
    assert large_store.count("list_page", "large/") == 1


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
    assert await look(namespace, "large/new") is NonObject.ABSENT
    large_store.put(key, b"other content")
    large_store.put("large/new", b"uploaded")

    await trio.sleep(NEGATIVE_TTL_S)
    assert await look(namespace, "large/new") == large_store.generation("large/new")
    await trio.sleep(TTL_S - NEGATIVE_TTL_S - 0.25)
    assert await look(namespace, key) == old
    await trio.sleep(0.25)
    assert await look(namespace, key) == large_store.generation(key) != old


async def test_names_of_a_large_directory_asked_for_longest_ago_are_forgotten_first(
    large_store: MemoryStore, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("trimsfs.namespace.directory.KNOWN_NAMES", 2)
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
    assert await look(namespace, "large/absent") is NonObject.ABSENT
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
    for number in range(LEAST_ASKED - 1):
        assert isinstance(await look(namespace, f"dir/{number:06}"), Generation)
    assert store.count("list_page", "dir/") == 2


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
        assert await look(namespace, "large/000007") is NonObject.ABSENT
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
    monkeypatch.setattr("trimsfs.namespace.tree.PAGES_LIMIT", 20)
    monkeypatch.setattr("trimsfs.namespace.inquiries.ENTRIES_LIMIT", 150)
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


@pytest.mark.parametrize("lie", ["one token", "one page", "no names", "two pages"])
async def test_a_listing_that_does_not_get_on_is_given_up_once(lie: str, autojump_clock: MockClock) -> None:
    """Its names are asked for one by one, and nobody lists it again soon."""
    store, asked = MemoryStore({"by name": b"content"}), 0

    async def list_page(prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        nonlocal asked
        if prefix:
            return Page(objects=(), prefixes=(), next_token=None)
        asked += 1
        key = {"one token": str(asked), "one page": "same", "no names": "", "two pages": str(asked % 2)}[lie]
        made = (a_generation(key),) if key else ()
        return Page(objects=made, prefixes=(), next_token="same" if lie == "one token" else str(asked))

    store.list_page = list_page  # type: ignore[method-assign]
    namespace = namespace_of(store)
    for _ in range(3):
        with pytest.raises(StoreUnavailableError, match=r"no end: .*: open its files by name"):
            await namespace.entries("")
        assert asked <= (3 if lie != "no names" else MOST_NAMELESS + 1)
    before = asked
    assert await namespace.lookup("", b"by name") == (store.generation("by name"), TTL_S)
    assert asked == before
    await trio.sleep(TTL_S)
    with pytest.raises(StoreUnavailableError, match="no end"):
        await namespace.entries("")
    assert asked > before


async def test_a_name_does_not_wait_for_a_long_listing(autojump_clock: MockClock) -> None:
    store = MemoryStore({f"{number:03}": b"x" for number in range(100)})
    list_page = store.list_page

    async def slowly(prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        await trio.sleep(0.1)
        return await list_page(prefix, token=token, limit=1)

    store.list_page = slowly  # type: ignore[method-assign]
    namespace = namespace_of(store)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.entries, "")
        await trio.sleep(0.05)
        assert await look(namespace, "007") == store.generation("007")
        assert trio.current_time() - began < LONG_S + 0.5
    assert trio.current_time() - began > 9
    assert len(namespace.known_entries("")) == 100


def slow_second_page(store: MemoryStore, seconds: float) -> None:
    """Have a store list one name in a page, and take its time for the second page."""
    list_page = store.list_page

    async def slowly(prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        page = await list_page(prefix, token=token, limit=1)
        if token is not None:
            await trio.sleep(seconds)
        return page

    store.list_page = slowly  # type: ignore[method-assign]


async def test_a_name_does_not_wait_for_one_slow_page(autojump_clock: MockClock) -> None:
    store = MemoryStore({"a": b"x", "b": b"x"})
    slow_second_page(store, 20)
    namespace = namespace_of(store)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.entries, "")
        await trio.sleep(0.05)
        assert await look(namespace, "b") == store.generation("b")
        assert trio.current_time() - began < LONG_S + 0.5
    assert list(namespace.known_entries("")) == [b"a", b"b"]


async def test_an_answer_for_a_name_outlives_an_older_listing(autojump_clock: MockClock) -> None:
    store = MemoryStore({"a": b"old", "b": b"x"})
    slow_second_page(store, 3)
    namespace = namespace_of(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.entries, "")
        await trio.sleep(0.05)
        store.put("a", b"new")
        store.put("c", b"new")
        for name in "ac":
            assert await look(namespace, name) == store.generation(name)
    assert namespace.known_entries("").get(b"a") != store.generation("a")
    for name in "ac":
        assert await look(namespace, name) == store.generation(name)


@pytest.mark.parametrize(
    ("etag", "size"),
    [("e", -1), ("e", SIZE_MAX + 1), ("", 1), ('""', 1), ("e" * (ETAG_MAX + 1), 1), ("e\r\nX: y", 1), ("é", 1)],
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
        assert await look(namespace, name) is NonObject.ABSENT
    assert await look(namespace, "large/good") == store.generation("large/good")


async def test_one_failed_request_does_not_end_the_listing_of_a_large_directory(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    retrying = RetryingStore(as_store(large_store), Retrying(deadline_s=15, on_failure=None))
    namespace = Namespace(retrying, impatient=as_store(large_store), ttl_s=TTL_S)
    before = await namespace.entries("large/")
    large_store.put("large/new", b"new")
    await trio.sleep(TTL_S)
    first = large_store.block(method="list_page", key="large/", times=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(namespace.entries, "large/")
        await trio.sleep(0.1)
        large_store.fail(TransientStoreError("503"), method="list_page", key="large/")
        first.set()
    assert (await namespace.entries("large/")).keys() == before.keys() | {b"new"}
