"""Digests are asked for while the object is still on its way."""

from functools import partial

import pytest
import trio

from tests.support.held import begin
from tests.support.parts import content_of
from tests.support.parts import opened as tier_opened
from tests.support.served import Server, Serving
from tests.support.stores import MemoryStore, as_store
from tests.unit.integrity.common import CHUNKS, Scene, counts_of, digest_of, down, opened
from trimsfs.errors import ObjectChangedError, StoreUnavailableError
from trimsfs.integrity.digest_prefetch import DigestPrefetch


@pytest.fixture
def store(content: bytes) -> MemoryStore:
    store = MemoryStore({"a": content})
    store.digests["a"] = digest_of(content, "sha256")
    return store


@pytest.fixture
def serving(serving: Serving) -> Serving:
    """Starts a server whose opens wait until a file is here and compared."""
    return partial(serving, digests="wait", retry_deadline=20.0)


async def test_the_digest_is_asked_for_while_the_object_comes(server: Server, scene: Scene) -> None:
    gate = scene.store.block(method="read")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opened, server)
        await scene.store.arrived(1, method="digest")
        assert scene.store.fetched == {}
        gate.set()
    assert scene.store.count("digest") == 1, "asked twice"
    assert await server.content("a") == scene.content
    assert counts_of(server).compared == 1


async def test_an_answer_that_takes_longer_than_the_object_is_waited_for(server: Server, scene: Scene) -> None:
    scene.store.corrupt("a", 77)
    gate = scene.store.block(method="digest")
    async with trio.open_nursery() as nursery:
        handles = begin(nursery, opened, server)
        await scene.store.arrived(CHUNKS)
        await trio.sleep(0.1)
        assert handles == []
        gate.set()
    assert await server.read(handles[0]) == scene.content
    assert counts_of(server).differing == 1


async def test_what_could_not_be_told_early_is_asked_again(server: Server, scene: Scene) -> None:
    scene.store.corrupt("a", 77)
    scene.store.fail(ObjectChangedError("a: not this one"), method="digest", times=1)
    assert await server.read(await opened(server)) == scene.content
    assert scene.store.count("digest") == 2
    assert counts_of(server).differing == 1


async def test_the_answer_for_what_was_replaced_is_not_taken_for_its_successor(scene: Scene) -> None:
    async with scene.serving(metadata_ttl=0.0, retry_deadline=0.1) as server:
        down(scene.store, method="read")
        with pytest.raises(StoreUnavailableError, match="down"):
            await server.open("a")
        scene.store.heal()
        newer = content_of("newer", CHUNKS * scene.chunk_size)
        scene.store.put("a", newer)
        scene.tells("sha256", newer)
        assert await server.read(await opened(server)) == newer
        assert counts_of(server).differing == 0


async def test_nothing_is_asked_for_what_is_not_compared(scene: Scene) -> None:
    async with scene.serving(digests="off") as server:
        assert await server.read(await opened(server)) == scene.content
    assert scene.store.count("digest") == 0


async def test_no_more_answers_are_kept_than_are_wanted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.integrity.digest_prefetch.MOST_ASKED", 2)
    store = MemoryStore({key: content_of(key, scene.chunk_size) for key in "abc"})
    digest_prefetch = DigestPrefetch(as_store(store), as_store(store))
    async with tier_opened(scene.cache, compares=True) as tier, trio.open_nursery() as nursery:
        await nursery.start(digest_prefetch.run)
        for key in "abc":
            async with tier.blobs.using(store.generation(key)) as blob:
                digest_prefetch.expect(blob)
        with trio.fail_after(5):
            await store.arrived(3, method="digest")
        for key, asked in (("c", 3), ("b", 3), ("a", 4)):
            await digest_prefetch.digest(store.generation(key))
            assert store.count("digest") == asked
        nursery.cancel_scope.cancel()
