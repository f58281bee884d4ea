"""Digests are asked for while the object is still on its way."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.parts import content_of
from tests.support.parts import opened as tier_opened
from tests.support.served import FakeBacking, Server, Serving, served
from tests.support.stores import MemoryStore, as_store
from tests.unit.integrity.common import digest_of, down, opened
from trimsfs.errors import ObjectChangedError
from trimsfs.integrity.digest_prefetch import DigestPrefetch

CHUNKS = 5


@pytest.fixture
def content(chunk_size: int) -> bytes:
    return content_of("a", CHUNKS * chunk_size)


@pytest.fixture
def store(content: bytes) -> MemoryStore:
    store = MemoryStore({"a": content})
    store.digests["a"] = digest_of(content, "sha256")
    return store


@pytest.fixture
def serving(store: MemoryStore, backing: FakeBacking, tmp_path: Path, chunk_size: int) -> Serving:
    """Starts a server whose opens wait until a file is here and compared."""
    return partial(
        served, store, tmp_path / "cache", chunk_size=chunk_size, backing=backing, cold_open="wait", digests="wait"
    )


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


async def test_the_digest_is_asked_for_while_the_object_comes(
    server: Server, store: MemoryStore, content: bytes
) -> None:
    gate = store.block(method="read")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened, server)
        await store.arrived(1, method="digest")
        assert store.fetched == {}
        gate.set()
    assert store.count("digest") == 1, "asked twice"
    assert await server.content("a") == content
    assert server.integrity.statistics().compared == 1


async def test_an_answer_that_takes_longer_than_the_object_is_waited_for(
    server: Server, store: MemoryStore, content: bytes
) -> None:
    store.corrupt("a", 77)
    gate = store.block(method="digest")
    handles: list[int] = []

    async def open_it() -> None:
        handles.append(await opened(server))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_it)
        await store.arrived(CHUNKS)
        await trio.sleep(0.1)
        assert handles == []
        gate.set()
    assert await server.read(handles[0]) == content
    assert server.integrity.statistics().differing == 1


async def test_what_could_not_be_told_early_is_asked_again(server: Server, store: MemoryStore, content: bytes) -> None:
    store.corrupt("a", 77)
    store.fail(ObjectChangedError("a: not this one"), method="digest", times=1)
    assert await server.read(await opened(server)) == content
    assert store.count("digest") == 2
    assert server.integrity.statistics().differing == 1


async def test_the_answer_for_what_was_replaced_is_not_taken_for_its_successor(
    serving: Serving, store: MemoryStore, content: bytes, chunk_size: int
) -> None:
    async with serving(metadata_ttl=0.0) as server:
        down(store, method="read")
        with pytest.raises(Exception, match="down"):
            await server.open("a")
        store.heal()
        newer = content_of("newer", CHUNKS * chunk_size)
        store.put("a", newer)
        store.digests["a"] = digest_of(newer, "sha256")
        assert await server.read(await opened(server)) == newer
        assert server.integrity.statistics().differing == 0


async def test_nothing_is_asked_for_what_is_not_compared(serving: Serving, store: MemoryStore, content: bytes) -> None:
    async with serving(digests="off") as server:
        assert await server.read(await opened(server)) == content
    assert store.count("digest") == 0


async def test_no_more_answers_are_kept_than_are_wanted(
    tmp_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.digest_prefetch.MOST_ASKED", 2)
    contents = {key: content_of(key, chunk_size) for key in "abc"}
    store = MemoryStore(contents)
    digest_prefetch = DigestPrefetch(as_store(store), as_store(store))
    async with tier_opened(tmp_path / "cache", compares=True) as tier, trio.open_nursery() as nursery:
        await nursery.start(digest_prefetch.run)
        for key in contents:
            async with tier.using(store.generation(key)) as blob:
                digest_prefetch.expect(blob)
        with trio.fail_after(5):
            await store.arrived(3, method="digest")
        for key, asked in (("c", 3), ("b", 3), ("a", 4)):
            await digest_prefetch.digest(store.generation(key))
            assert store.count("digest") == asked
        nursery.cancel_scope.cancel()
