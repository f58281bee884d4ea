"""A store that fails makes no name absent."""

from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore, as_store
from tests.unit.namespace.common import TTL_S, down, look, namespace_of
from trimsfs.errors import StoreAccessError, StoreUnavailableError, TransientStoreError
from trimsfs.namespace.directory import STALE_RETRY_S
from trimsfs.namespace.lifetimes import NEGATIVE_TTL_S
from trimsfs.namespace.listing import NonObject
from trimsfs.namespace.tree import Namespace
from trimsfs.stores.retrying import Retrying, RetryingStore


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
    assert await look(namespace, "absent") is NonObject.ABSENT


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


async def test_what_is_known_to_be_replaced_is_asked_for_though_an_attempt_has_failed(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    """While the store seems to be down, names are believed for longer; not one that has just been found outdated."""
    namespace = Namespace(
        RetryingStore(as_store(store), Retrying(deadline_s=15, on_failure=None)), ttl_s=TTL_S, impatient=as_store(store)
    )
    known = await look(namespace, "a")
    await trio.sleep(TTL_S)
    store.fail(down())
    assert await look(namespace, "a") == known
    assert await look(namespace, "absent") is NonObject.ABSENT
    before = [store.generation(key) for key in ("a", "b")]
    store.put("a", b"another content")
    store.delete("b")
    for generation in before:
        namespace.replaced(generation)
    store.fail(TransientStoreError("reset"), times=2)
    assert await look(namespace, "a") == store.generation("a")
    assert await look(namespace, "b") is NonObject.ABSENT
    store.fail(down(), times=float("inf"))
    namespace.replaced(store.generation("a"))
    assert await look(namespace, "a") == known  # better than nothing: its content may be here


async def test_what_is_known_to_be_replaced_is_asked_for_though_a_request_has_just_failed(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    """A recent failure stands for the store's answer only where the last answer may still be right."""
    namespace = namespace_of(store)
    known = await look(namespace, "a")
    await trio.sleep(TTL_S)
    store.fail(down())
    assert await look(namespace, "a") == known
    store.put("a", b"another content")
    namespace.mark_outdated("a")
    assert await look(namespace, "a") == store.generation("a")


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
        namespace.mark_outdated(key)
        await trio.sleep(1)
        for _ in range(3):
            assert await look(namespace, key) == objects.generation(key)
        assert len(objects.requests) == asked + 2
        namespace.mark_outdated(key)
        objects.fail(down(), times=float("inf"))
        assert await look(namespace, key) == objects.generation(key)  # in doubt, but better than nothing


async def test_failure_in_one_directory_leaves_the_others_alone(store: MemoryStore) -> None:
    namespace = namespace_of(store)
    store.fail(StoreAccessError("not allowed"), times=float("inf"), key="dir/")
    with pytest.raises(StoreAccessError):
        await look(namespace, "dir/c")
    assert await look(namespace, "a") == store.generation("a")
