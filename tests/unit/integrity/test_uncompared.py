"""What has not been compared with the store is compared before it is given, where that is wanted, or later."""

import os
import sqlite3
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.support.held import Held, reached, unless_refused
from tests.support.parts import fail_to_sync, failing, until
from tests.support.served import Server
from tests.unit.integrity.common import Scene, comes_right, counted, counts_of, down, opened
from trimsfs.errors import StoreUnavailableError, TransientStoreError
from trimsfs.fetch.processes import thread_copier
from trimsfs.integrity.deferred import LONGEST_INTERVAL_S, _Entry
from trimsfs.stores.digests import Algorithm
from trimsfs.tiers.blob import Blob


async def test_what_could_not_be_verified_is_still_compared_later(scene: Scene) -> None:
    scene.tells("md5")
    scene.store.corrupt("a", 77)
    down(scene.store, method="digest")
    async with scene.serving() as server:
        handle = await opened(server)
        await counted(server, to_compare=1)
        assert (await server.outcome("verify", "a"))[0] == "failed"
        scene.store.heal()
        assert await comes_right(server, handle, scene.content)


def full_index(patch: pytest.MonkeyPatch, server: Server, _scene: Scene) -> None:
    """The disk is full, so that the index cannot grow."""
    patch.setattr(server.disk.index, "add_chunks", failing(sqlite3.SQLITE_FULL))


def no_digests(patch: pytest.MonkeyPatch, server: Server, _scene: Scene) -> None:
    async def ended(*_: object) -> bytes:
        raise TransientStoreError("the fetch process died")

    patch.setattr(server.integrity.comparer._copier, "digest", ended)


def lost_chunk(_patch: pytest.MonkeyPatch, _server: Server, scene: Scene) -> None:
    error = StoreUnavailableError("away")
    scene.store.fail(error, method="read", offset=3 * scene.chunk_size, times=float("inf"))


@pytest.mark.parametrize(
    ("trouble", "algorithm", "backing"),
    [(full_index, "crc32c", True), (no_digests, "sha256", True), (lost_chunk, "crc32c", False)],
)
async def test_nothing_is_given_uncompared_while_it_cannot_be_compared(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Callable[[pytest.MonkeyPatch, Server, Scene], None],
    algorithm: Algorithm,
    backing: bool,
) -> None:
    async def first_chunk() -> bytes:
        return await server.read(await server.open("a"), 0, scene.chunk_size)

    scene.tells(algorithm)
    scene.store.corrupt("a", 77)
    async with scene.serving(digests="wait", **({} if backing else {"backing": None})) as server:
        trouble(monkeypatch, server, scene)
        assert await unless_refused(first_chunk()) in {None, scene.content[: scene.chunk_size]}


async def test_no_more_than_wait_read_uncompared(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.opening.cold_open.MOST_WAITING", 1)
    scene.tells("crc32c")
    scene.store.corrupt("a", 77)
    async with scene.serving(digests="wait") as server:
        gate = scene.store.block(method="read", key="b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.content, "b")
            await reached(gate)
            assert await unless_refused(server.content("a")) in {None, scene.content}
            gate.set()


async def test_a_bit_that_was_flipped_as_a_scrub_fetched_again_is_found(scene: Scene) -> None:
    scene.tells("crc32c")
    async with scene.serving(scrub_interval=0.1) as server:
        handle = await opened(server)
        assert await server.read(handle) == scene.content
        scene.store.corrupt("a", 77)
        scene.damage()
        await until(lambda: counts_of(server).repaired_chunks >= 1)
        assert await comes_right(server, handle, scene.content)


async def test_verify_of_a_file_that_is_mended_wrong_by_two(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that a comparison has read already is damaged, and mended by a scrub with a flipped bit."""
    digesting = Held(monkeypatch, thread_copier, "compute", times=1, after=True)
    digest = scene.tells("md5")
    async with scene.serving() as server:
        handle = await opened(server)
        await digesting.reached()
        scene.store.corrupt("a", 77)
        scene.damage()
        async with server.disk.blobs.inspecting(scene.store.generation("a")) as blob:
            await server.integrity.repair.check(blob)
        assert counts_of(server).repaired_chunks == 1
        digesting.go.set()
        await counted(server, to_compare=0)
        await trio.sleep(0.2)
        right = await server.read(handle) == scene.content
        assert right or await server.attribute("a", "digest") != str(digest), "wrong bytes, and told to be right"


@pytest.mark.parametrize("how", ["cut off", "not synced"])
async def test_what_is_closed_while_it_is_compared_does_not_end_the_server(
    scene: Scene, digesting: Held, how: str
) -> None:
    scene.tells("md5")
    async with scene.serving() as server:
        server.release(await opened(server))
        await digesting.reached()
        blob = scene.blob(server)
        await until(lambda: blob.users == 0)
        if how == "cut off":
            os.truncate(scene.file, 100)
            async with server.disk.blobs.using(scene.store.generation("a")):
                pass
        else:
            await fail_to_sync(server.disk, blob)
        digesting.go.set()
        await trio.sleep(1.2)
        assert await server.content("a") == scene.content


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
async def test_what_is_mended_with_the_same_bytes_while_it_is_compared_is_compared_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm
) -> None:
    digested = Held(monkeypatch, thread_copier, "compute", times=1, after=True)
    digesting = Held(monkeypatch, thread_copier, "compute", times=1)
    scene.tells(algorithm)
    async with scene.serving() as server:
        handle = await opened(server)
        await digesting.reached()
        scene.damage()
        digesting.go.set()
        await digested.reached()  # of damaged bytes
        async with server.disk.blobs.inspecting(scene.store.generation("a")) as blob:
            await server.integrity.repair.check(blob, in_memory=True)  # as a scrub
            assert counts_of(server).repaired_chunks == 1
            digested.go.set()
            await counted(server, to_compare=0)
            assert (blob.health.quarantine, server.integrity.comparer.trust.certain_only) == (None, False)
            assert blob.health.digest
        assert await server.read(handle) == scene.content


async def test_an_open_of_what_is_here_does_not_wait_until_the_store_tells_a_digest(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.integrity.PATIENCE_S", 0.5)
    scene.tells("crc32c")
    gate = scene.store.block(method="digest")
    with trio.fail_after(20):
        async with scene.serving(cold_open="auto") as server:
            assert await server.content("a") == scene.content
            assert counts_of(server).to_compare == 1
            gate.set()
            await counted(server, compared=1)


async def test_a_file_is_compared_again_ever_later_and_the_reason_told_once(
    scene: Scene, caplog: pytest.LogCaptureFixture, mock_clock: trio.testing.MockClock
) -> None:
    entry, pauses = _Entry(Blob("token", scene.store.generation("a")), due=1000.0), list[float]()
    for _ in range(10):
        entry.failed(TransientStoreError("503"))
        pauses.append(entry.not_before - mock_clock.current_time())
    entry.failed(TransientStoreError("500"))
    assert pauses[1:3] == [2 * pauses[0], 4 * pauses[0]]
    assert pauses[-1] == LONGEST_INTERVAL_S
    assert [line.rpartition(": ")[2] for line in caplog.messages if "not compared" in line] == ["503", "500"]
