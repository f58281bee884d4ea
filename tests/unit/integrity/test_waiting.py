"""With ``--digests wait``, nothing is given that has not been compared."""

from collections.abc import Callable

import pytest
import trio

from tests.support.held import unless_refused
from tests.support.parts import fail_to_sync, until
from tests.support.served import FakeBacking
from tests.unit.integrity.common import Scene, counts_of, down, opened
from trimsfs.handover.ledger import Ledger
from trimsfs.tiers import extents
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk import crash_recovery


async def test_what_came_for_lost_bytes_is_not_read_uncompared(scene: Scene) -> None:
    scene.tells("crc32c")
    async with scene.serving(digests="wait", backing=None) as server:
        handle = await server.open("a")
        assert await server.read(handle) == scene.content
        blob = scene.blob(server)
        await fail_to_sync(server.disk, blob)
        assert not blob.complete
        scene.store.corrupt("a", 77)
        await trio.sleep(1.1)
        found = await unless_refused(server.read(handle, 0, scene.chunk_size))
        assert found in {None, scene.content[: scene.chunk_size]}


async def test_what_was_mended_with_other_bytes_is_not_opened_uncompared(scene: Scene) -> None:
    """A slow scrub mends with a flipped bit; until it has ended, who opens the resident file gets that."""
    scene.tells("crc32c")
    async with scene.serving(digests="wait") as server:
        server.release(await opened(server))
        await server.disk.journal.flush()
        server.integrity.scrubber._rate = scene.chunk_size // 2  # two seconds a chunk
        scene.store.corrupt("a", 77)
        scene.damage()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.integrity.scrubber.scrub, scene.store.generation("a"))
            await until(lambda: counts_of(server).repaired_chunks == 1)
            assert not scene.blob(server).health.compared
            assert await unless_refused(server.content("a")) in {None, scene.content}
            nursery.cancel_scope.cancel()


async def test_what_the_server_before_announced_uncompared_is_compared_before_it_is_opened(
    scene: Scene, ledger: Callable[[], Ledger]
) -> None:
    backing = FakeBacking()
    scene.tells("md5")
    down(scene.store, method="digest")
    scene.store.corrupt("a", 77)
    async with scene.serving(backing=backing, ledger=ledger()) as server:
        await opened(server)
        await server.disk.journal.flush()
    scene.store.heal()
    gate = scene.store.block(method="digest")
    found = None
    async with scene.serving(backing=backing, ledger=ledger(), digests="wait") as server:
        with trio.move_on_after(1):
            found = await unless_refused(server.content("a"))
        gate.set()
        await trio.sleep(0.2)
    backing.dispose()
    assert found in {None, scene.content}


async def test_what_is_all_here_is_compared_though_others_find_no_room(scene: Scene) -> None:
    scene.tells("sha256")
    async with scene.serving(backing=None, digests="wait") as server:
        handle = await server.open("a")
        assert await server.read(handle) == scene.content
        scene.store.corrupt("a", 77)
        await server.disk.damage.check_chunk(scene.blob(server), 0, None)
        await server.fetcher.fetch_all(scene.blob(server))
        server.disk.budget.found_full("")
        assert await server.read(handle) == scene.content


async def test_a_read_that_ends_with_the_server_is_left_to_the_next(scene: Scene) -> None:
    scene.tells("sha256")
    async with scene.serving(backing=None, digests="wait") as server:
        handle = await server.open("a")
        nursery = server.passthrough._background._nursery
        assert nursery is not None
        nursery.cancel_scope.cancel()
        await trio.sleep(0.05)
        scene.blob(server).health.digest = None
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.read(handle)
        assert scope.cancelled_caught


async def test_what_is_found_to_have_been_cut_off_as_it_is_opened_is_fetched_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.tells("sha256")
    looks: list[list[int]] = []

    def zeroed(blob: Blob, descriptor: int) -> list[int]:
        if not looks:
            extents.punch_hole(descriptor, 0, scene.chunk_size)
        looks.append(crash_recovery.chunks_in_holes(blob, descriptor))
        return looks[-1]

    monkeypatch.setattr("trimsfs.tiers.disk.damage.chunks_in_holes", zeroed)
    async with scene.serving(digests="wait") as server:
        assert await server.content("a") == scene.content
        assert looks == [[0], []]
