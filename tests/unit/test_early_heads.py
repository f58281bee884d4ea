"""Heads come beside the listing that a name leads to, and only the content that was asked for gets them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import content_of
from tests.support.served import Serving
from tests.support.stores import MemoryStore, Request
from tests.unit.namespace.common import look, namespace_of
from tests.unit.signature_policy.common import KEY
from trimsfs.errors import ObjectNotFoundError, StoreAccessError, StoreUnavailableError, TransientStoreError, TrimsError
from trimsfs.extras.signatures.signed_manifest import read_manifest
from trimsfs.fetch.bypass import HEAD_BYTES, LEAST_SIZE, MOST_AT_ONCE, EarlyHeads
from trimsfs.stores.base import Head
from trimsfs.stores.circuit_breaker import CircuitBreaker

LARGE = content_of("large", 2 * LEAST_SIZE)


class PeekableStore(MemoryStore):
    """As S3 is: it gives the first bytes of an object by its key alone."""

    async def peek(self, key: str, length: int) -> Head:
        async with self._serving(Request(method="peek", key=key, length=length)):
            if key not in self._current:
                raise ObjectNotFoundError(key)
            generation = self.generation(key)
            return Head(generation.etag, generation.size, self.contents[key, generation.etag][:length])

    def peeked(self) -> list[str]:
        """The keys whose first bytes were asked for."""
        return [request.key for request in self.requests if request.method == "peek"]


@asynccontextmanager
async def heads_of(store: PeekableStore, breaker: CircuitBreaker | None = None) -> AsyncIterator[EarlyHeads]:
    heads = EarlyHeads(store, breaker or CircuitBreaker(deadline_s=1))
    async with trio.open_nursery() as nursery:
        await nursery.start(heads.run)
        yield heads
        nursery.cancel_scope.cancel()


@pytest.fixture
def store() -> PeekableStore:
    return PeekableStore({"m/large": LARGE, "m/small": b"small", "n/other": b"other"}, streaming=True)


async def test_a_head_is_given_once(store: PeekableStore) -> None:
    async with heads_of(store) as heads:
        heads.expect("m/large")
        assert await heads.of(store.generation("m/large")) == LARGE[:HEAD_BYTES]
        assert await heads.of(store.generation("m/large")) is None
        heads.expect("m/small")
        assert await heads.of(store.generation("m/small")) == b"small"


async def test_a_head_of_another_content_or_size_is_not_given(store: PeekableStore) -> None:
    before = store.generation("m/large")
    store.put("m/large", LARGE[::-1])
    now = store.generation("m/large")
    async with heads_of(store) as heads:
        for other in (before, replace(now, size=3 * LEAST_SIZE)):
            heads.expect("m/large")
            assert await heads.of(other) is None


async def test_nobody_waits_long_for_a_head(store: PeekableStore, autojump_clock: trio.testing.MockClock) -> None:
    store.block(method="peek")
    async with heads_of(store) as heads:
        heads.expect("m/large")
        with trio.fail_after(1):
            assert await heads.of(store.generation("m/large")) is None


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), ValueError("a defect")])
async def test_a_request_that_fails_ends_alone(
    store: PeekableStore, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    store.fail(error, method="peek")  # type: ignore[arg-type]
    async with heads_of(store) as heads:
        heads.expect("m/large")
        assert await heads.of(store.generation("m/large")) is None
        assert ("m/large: first bytes not fetched: internal error" in caplog.text) == isinstance(error, ValueError)
        heads.expect("m/large")
        assert await heads.of(store.generation("m/large")) == LARGE[:HEAD_BYTES]


async def test_a_name_is_asked_for_once_at_a_time(store: PeekableStore) -> None:
    gate = store.block(method="peek")
    async with heads_of(store) as heads:
        for _ in range(3):
            heads.expect("m/large")
        await wait_all_tasks_blocked()
        gate.set()
        assert await heads.of(store.generation("m/large")) == LARGE[:HEAD_BYTES]
        assert store.peeked() == ["m/large"]


async def test_few_are_asked_for_at_once(store: PeekableStore) -> None:
    gate = store.block(method="peek")
    async with heads_of(store) as heads:
        for number in range(2 * MOST_AT_ONCE):
            heads.expect(f"m/{number}")
        await wait_all_tasks_blocked()
        assert len(store.peeked()) == MOST_AT_ONCE
        gate.set()
        await wait_all_tasks_blocked()
        heads.expect("m/large")
        assert await heads.of(store.generation("m/large")) == LARGE[:HEAD_BYTES]


@pytest.mark.parametrize("trouble", ["away", "failing", "refusing"])
async def test_none_is_asked_for_while_the_store_does_not_serve(store: PeekableStore, trouble: str) -> None:
    breaker = CircuitBreaker(deadline_s=1)
    if trouble == "away":
        breaker.give_up(StoreUnavailableError("away"))
    elif trouble == "failing":
        breaker.failed(TransientStoreError("busy"), trio.current_time())
    else:
        breaker.refused(read=True)
    async with heads_of(store, breaker) as heads:
        heads.expect("m/large")
        await wait_all_tasks_blocked()
        assert store.peeked() == []


async def test_none_is_asked_for_where_the_directory_may_not_be_listed(store: PeekableStore) -> None:
    told = list[str]()
    namespace = namespace_of(store, unlisted=told.append)
    store.fail(StoreAccessError("may not be listed"), method="list_page", key="m/", times=10)
    for _ in range(3):
        with pytest.raises(StoreAccessError):
            await look(namespace, "m/large")
    assert told == ["m/large"]


async def test_a_root_that_cannot_be_listed_ahead_is_listed_for_the_first_name(store: PeekableStore) -> None:
    namespace = namespace_of(store)
    store.fail(TransientStoreError("busy"), method="list_page")
    with pytest.raises(TransientStoreError):
        await namespace.look_ahead("m/")
    assert await look(namespace, "m/large") == store.generation("m/large")


async def test_only_a_name_in_a_directory_of_which_nothing_is_known_is_told(store: PeekableStore) -> None:
    told = list[str]()
    namespace = namespace_of(store, unlisted=told.append)
    for path in ("m/large", "m/small", "m/absent", "n/other"):
        await look(namespace, path)
    namespace.expire("")
    await look(namespace, "m/large")
    await namespace.look_ahead("o/")
    await look(namespace, "o/absent")
    assert told == ["m/large", "n/other"]


async def test_what_came_since_a_listing_ahead_is_there(store: PeekableStore) -> None:
    namespace = namespace_of(store)
    await namespace.look_ahead("m/")
    assert await look(namespace, "m/large") == store.generation("m/large")
    assert store.count("list_page") == 1
    store.put("m/new", b"new")
    assert await look(namespace, "m/new") == store.generation("m/new")
    store.put("m/newer", b"newer")
    assert b"newer" in await namespace.entries("m/")


async def test_a_listing_ahead_serves_while_the_store_is_away(store: PeekableStore) -> None:
    namespace = namespace_of(store)
    await namespace.look_ahead("m/")
    store.fail(TransientStoreError("away"), method="list_page", times=10)
    asked = store.count("list_page")
    for _ in range(3):
        assert b"large" in await namespace.entries("m/")
    assert store.count("list_page") == asked + 1
    assert await look(namespace, "m/large") == store.generation("m/large")


async def test_the_first_bytes_of_a_file_come_beside_the_listing_of_its_directory(
    serving: Serving, store: PeekableStore
) -> None:
    async with serving(cold_open="auto") as server:
        gate = store.block(method="read")
        handle = await server.open("m/large")
        with trio.fail_after(5):
            assert await server.read(handle, 0, 8) == LARGE[:8]
        gate.set()
        assert store.peeked().count("m/large") == 1
        assert not [request for request in store.requests if request.length == HEAD_BYTES and request.method == "read"]


@pytest.mark.parametrize(
    "options", [{"digests": "wait"}, {"signatures": "require"}, {"cold_open": "wait"}, {"cold_open": "stream"}], ids=str
)
async def test_none_is_asked_for_where_no_byte_may_come_alone(
    serving: Serving, store: PeekableStore, options: dict[str, str]
) -> None:
    read = partial(read_manifest, key=KEY.public_key()) if "signatures" in options else None
    async with serving(read_manifest=read, **{"cold_open": "auto"} | options) as server:
        with suppress(TrimsError):
            await server.open("m/small")
        assert store.peeked() == []
