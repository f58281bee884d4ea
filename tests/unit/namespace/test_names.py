"""Names are looked up with few requests, and believed for a time."""

import logging

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore, Reticent
from tests.unit.namespace.common import TTL_S, look, namespace_of
from trimsfs.errors import StoreAccessError
from trimsfs.namespace.lifetimes import NEGATIVE_TTL_S
from trimsfs.namespace.listing import NonObject, possible
from trimsfs.types import Generation


async def test_what_the_store_may_not_look_at_is_listed_and_fails_the_lookup(autojump_clock: MockClock) -> None:
    """It is never told to be absent, and found at once when the store may look at it."""
    store = Reticent({"dir/a": b"a"})
    namespace = namespace_of(store)
    for _ in range(3):
        assert (await namespace.entries("dir/"))[b"secret"] is NonObject.UNREADABLE
        for name in ("dir/secret", "dir/secret"):
            with pytest.raises(StoreAccessError, match="dir/secret: Permission denied"):
                await look(namespace, name)
        assert await look(namespace, "dir/a") == store.generation("dir/a")
        await trio.sleep(TTL_S)
    await namespace.entries("dir/")
    store.secret = False
    store.put("dir/secret", b"weights")
    assert await look(namespace, "dir/secret") == store.generation("dir/secret")


# Lazily, with as few requests as possible


async def test_siblings_cost_one_request(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    assert await look(namespace, "a") == store.generation("a")
    assert await look(namespace, "b") == store.generation("b")
    assert await look(namespace, "dir") is NonObject.DIRECTORY
    assert await look(namespace, "absent") is NonObject.ABSENT
    assert list(await namespace.entries("")) == [b"a", b"b", b"dir"]
    assert [(request.method, request.key) for request in store.requests] == [("list_page", "")]


async def test_a_key_that_is_no_text_is_hidden() -> None:
    store = MemoryStore({"d/a": b"a", "d/\ud800": b"no text"})
    namespace = namespace_of(store)
    assert list(await namespace.entries("d/")) == [b"a"]
    assert namespace.statistics().hidden_keys == 1


async def test_siblings_looked_up_at_once_cost_one_request(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "dir", "absent", "x", "y", "z"):
            nursery.start_soon(look, namespace, name)
        nursery.start_soon(namespace.entries, "")
    assert len(store.requests) == 1


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
    assert await look(namespace, "b") is NonObject.ABSENT
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
        assert (entry, left) == (NonObject.ABSENT, negative_ttl_s)
        store.put(name, b"uploaded")

        await trio.sleep(negative_ttl_s - 0.25)
        assert await look(namespace, name) is NonObject.ABSENT
        await trio.sleep(0.25)
        assert await look(namespace, name) == store.generation(name)


async def test_asking_again_for_an_absent_name_does_not_list_the_directory_again(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(store)
    for _ in range(5):
        assert await look(namespace, "absent") is NonObject.ABSENT
        await trio.sleep(NEGATIVE_TTL_S)
    assert store.count("list_page", "") == 1
    assert store.count("stat", "absent") == 4


async def test_without_time_to_live_every_lookup_asks(store: MemoryStore) -> None:
    namespace = namespace_of(store, ttl_s=0)
    for content in (b"one", b"two", b"three"):
        store.put("a", content)
        entry, left = await namespace.lookup("", b"a")
        assert (entry, left) == (store.generation("a"), 0)
    store.delete("a")
    assert (await namespace.lookup("", b"a"))[0] is NonObject.ABSENT


# Keys that are no file names


async def test_directory_wins_over_an_object_of_its_name(store: MemoryStore) -> None:
    store.put("dir", b"an object")
    namespace = namespace_of(store)
    assert await look(namespace, "dir") is NonObject.DIRECTORY
    assert (await namespace.entries(""))[b"dir"] is NonObject.DIRECTORY
    assert await look(namespace, "dir/c") == store.generation("dir/c")
    assert namespace.statistics().hidden_keys == 1


async def test_directory_wins_over_an_object_of_its_name_in_a_large_directory(large_store: MemoryStore) -> None:
    large_store.put("large/both", b"an object")
    large_store.put("large/both/below", b"an object")
    namespace = namespace_of(large_store)
    assert await look(namespace, "large/both") is NonObject.DIRECTORY
    assert (await namespace.entries("large/"))[b"both"] is NonObject.DIRECTORY


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


@pytest.mark.parametrize("name", [b"", b".", b"..", b".trims", b"n" * 256, b"nul\0", b"a/b", b"/"])
async def test_impossible_name_is_absent_without_asking(store: MemoryStore, name: bytes) -> None:
    assert not possible(name)
    namespace = namespace_of(store)
    assert (await namespace.lookup("", name))[0] is NonObject.ABSENT
    assert store.requests == []


async def test_name_that_is_not_utf8_is_asked_for_as_it_is(large_store: MemoryStore) -> None:
    large_store.put("large/\udce9t\udce9", b"latin-1")
    namespace = namespace_of(large_store)
    entry, _ = await namespace.lookup("large/", b"\xe9t\xe9")
    assert entry == large_store.generation("large/\udce9t\udce9")
    assert b"\xe9t\xe9" in await namespace.entries("large/")


async def test_a_directory_whose_name_the_store_refuses_to_look_up(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    """S3 does so for a key that is none, to a user who may list only what begins with some prefix."""
    store.put("dir/model", b"x")
    namespace = namespace_of(store)
    assert await look(namespace, "other") is NonObject.ABSENT
    store.fail(StoreAccessError("403"), times=float("inf"), method="stat")
    for name in ("dir", "other"):
        namespace.mark_outdated(name)
    await trio.sleep(0.1)
    assert await look(namespace, "dir") is NonObject.DIRECTORY
    with pytest.raises(StoreAccessError, match="403"):
        await look(namespace, "other")


async def test_a_name_that_a_refresh_found_deleted_does_not_come_back(autojump_clock: MockClock) -> None:
    """The listing, which is older, counts for longer than an absence."""
    store = MemoryStore({"dir/a": b"a", "dir/b": b"b"})
    namespace = namespace_of(store)
    await namespace.entries("dir/")
    store.delete("dir/a")
    await trio.sleep(1)
    namespace.mark_outdated("dir/a")
    await trio.sleep(1)
    assert await look(namespace, "dir/a") is NonObject.ABSENT
    await trio.sleep(NEGATIVE_TTL_S + 1)
    assert await look(namespace, "dir/a") is NonObject.ABSENT


async def test_an_answer_from_before_a_replacement_is_not_believed(
    large_store: MemoryStore, autojump_clock: MockClock
) -> None:
    namespace = namespace_of(large_store)
    known = large_store.generation("large/000001")
    await look(namespace, "large/000001")
    gate = large_store.block(method="stat", key="large/000002")
    left = list[float]()

    async def ask() -> None:
        left.append((await namespace.lookup("large/", b"000002"))[1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(1)
        large_store.put("large/000001", b"other")
        namespace.replaced(known)
        gate.set()
    assert left == [0.0]
