"""With ``--digests wait``, nothing is given that has not been compared."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, blob_of, fail_to_sync, flip_byte, until
from tests.support.served import FakeBacking, Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of, down, opened
from trimsfs.errors import StoreUnavailableError, TrimsError
from trimsfs.handover.ledger import Ledger
from trimsfs.tiers import extents
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk import crash_recovery


async def test_what_came_for_lost_bytes_is_not_read_uncompared(
    serving: Serving, store: MemoryStore, content: bytes, chunk_size: int
) -> None:
    store.digests["a"] = digest_of(content, "crc32c")
    async with serving(digests="wait", backing=None) as server:
        handle = await server.open("a")
        assert await server.read(handle) == content
        blob = blob_of(server.disk, store, "a")
        await fail_to_sync(server.disk, blob)
        assert not blob.complete
        store.corrupt("a", 77)
        await trio.sleep(1.1)
        try:
            found = await server.read(handle, 0, chunk_size)
        except TrimsError:
            return
        assert found == content[:chunk_size], "given uncompared"


async def test_what_is_partly_here_is_not_read_uncompared_while_the_store_fails(
    serving: Serving, store: MemoryStore, content: bytes, chunk_size: int
) -> None:
    store.digests["a"] = digest_of(content, "crc32c")
    store.corrupt("a", 77)
    store.fail(StoreUnavailableError("away"), method="read", offset=3 * chunk_size, times=float("inf"))
    async with serving(digests="wait", cold_open="wait", backing=None) as server:
        try:
            handle = await server.open("a")
            found = await server.read(handle, 0, chunk_size)
        except TrimsError:
            return
        assert found == content[:chunk_size], "given uncompared"


async def test_what_was_mended_with_other_bytes_is_not_opened_uncompared(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, chunk_size: int
) -> None:
    """A slow scrub mends with a flipped bit; until it has ended, who opens the resident file gets that."""
    store.digests["a"] = digest_of(content, "crc32c")
    async with serving(digests="wait") as server:
        server.release(await opened(server))
        await server.disk.flush()
        server.integrity.scrubber._rate = chunk_size // 2  # two seconds a chunk
        store.corrupt("a", 77)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.integrity.scrubber.scrub, store.generation("a"))
            await until(lambda: server.integrity.statistics().repaired_chunks == 1)
            blob = blob_of(server.disk, store, "a")
            assert not blob.health.compared
            try:
                found = await server.content("a")
            except TrimsError:
                found = content
            nursery.cancel_scope.cancel()
        assert found == content, "given uncompared, though --digests wait"


async def test_what_the_server_before_announced_uncompared_is_compared_before_it_is_opened(
    serving: Serving, store: MemoryStore, content: bytes, ledger: Callable[[], Ledger]
) -> None:
    backing = FakeBacking()
    store.digests["a"] = digest_of(content, "md5", certain=False)
    down(store, method="digest")
    store.corrupt("a", 77)
    async with serving(backing=backing, ledger=ledger()) as server:
        await opened(server)
        await server.disk.flush()
    store.heal()
    gate = store.block(method="digest")
    async with serving(backing=backing, ledger=ledger(), digests="wait") as server:
        found = content
        with trio.move_on_after(1):
            with contextlib.suppress(TrimsError):
                found = await server.content("a")
        gate.set()
        await trio.sleep(0.2)
    backing.dispose()
    assert found == content, "given uncompared, though --digests wait"


async def test_what_is_all_here_is_compared_though_others_find_no_room(
    serving: Serving, store: MemoryStore, content: bytes
) -> None:
    store.digests["a"] = digest_of(content, "sha256")
    async with serving(backing=None, digests="wait") as server:
        handle = await server.open("a")
        assert await server.read(handle) == content
        blob = blob_of(server.disk, store, "a")
        store.corrupt("a", 77)
        await server.disk.damage.check_chunk(blob, 0, None)
        await server.fetcher.fetch_all(blob)
        server.disk._budget.found_full("")
        assert await server.read(handle) == content


async def test_a_read_that_ends_with_the_server_is_left_to_the_next(
    serving: Serving, store: MemoryStore, content: bytes
) -> None:
    store.digests["a"] = digest_of(content, "sha256")
    async with serving(backing=None, digests="wait") as server:
        handle = await server.open("a")
        nursery = server.passthrough._background._nursery
        assert nursery is not None
        nursery.cancel_scope.cancel()
        await trio.sleep(0.05)
        blob_of(server.disk, store, "a").health.digest = None
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.read(handle)
        assert scope.cancelled_caught


async def test_what_is_found_to_have_been_cut_off_as_it_is_opened_is_fetched_again(
    serving: Serving, store: MemoryStore, content: bytes, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.digests["a"] = digest_of(content, "sha256")
    looks: list[list[int]] = []

    def zeroed(blob: Blob, descriptor: int) -> list[int]:
        if not looks:
            extents.punch_hole(descriptor, 0, chunk_size)
        looks.append(crash_recovery.chunks_in_holes(blob, descriptor))
        return looks[-1]

    monkeypatch.setattr("trimsfs.tiers.disk.disk_tier.chunks_in_holes", zeroed)
    async with serving(digests="wait", cold_open="wait") as server:
        assert await server.content("a") == content
        assert looks == [[0], []]
