"""What changes while something else is being done about a file."""

import os

import pytest
import trio

from tests.support.held import Held, begin, reached, unless_refused
from tests.support.parts import until
from tests.support.served import FakeBacking
from tests.unit.integrity.common import Scene, comes_right, counted, counts_of, down, opened
from trimsfs.errors import StoreUnavailableError
from trimsfs.integrity import chunk_checks
from trimsfs.stores.digests import Algorithm


async def test_a_comparison_while_other_bytes_are_written_does_not_count(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scrub mends with a flipped bit; meanwhile what was put off is compared (CRC32C of the records)."""
    scene.tells("crc32c")
    down(scene.store, method="digest")
    writing = Held(monkeypatch, chunk_checks, "_copy")
    async with scene.serving() as server:
        handle = await opened(server)
        await counted(server, to_compare=1)
        scene.store.corrupt("a", 77)
        scene.damage()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.integrity.scrubber.scrub, scene.store.generation("a"))
            await writing.reached()
            scene.store.heal()
            await counted(server, to_compare=0)
            writing.go.set()
        assert await comes_right(server, handle, scene.content)


@pytest.mark.parametrize("mode", ["wait", "auto"])
async def test_what_is_lost_while_it_is_announced_is_compared_before(scene: Scene, mode: str) -> None:
    scene.tells("crc32c")
    backing = FakeBacking()
    backing.gate = trio.Event()
    async with scene.serving(digests=mode, backing=backing) as server:

        async def read() -> tuple[int, bytes]:
            handle = await server.open("a")
            return handle, await server.read(handle)

        token = scene.store.generation("a").token(scene.store.identity)
        async with trio.open_nursery() as nursery:
            reading = begin(nursery, read)
            await until(lambda: (known := server.disk.blobs.known(token)) is not None and known.health.compared)
            blob = scene.blob(server)
            await trio.sleep(0.1)
            scene.store.corrupt("a", 77)
            os.truncate(scene.file, 100)
            async with server.disk.blobs.using(scene.store.generation("a")) as other:
                assert other is blob
                await server.fetcher.fetch_all(blob)
            assert blob.complete
            backing.gate.set()
        await trio.sleep(1.5)
        ((handle, found),) = reading
        assert found == scene.content
        assert await server.read(handle) == scene.content


async def test_what_is_damaged_stays_in_doubt_though_the_store_fails(scene: Scene) -> None:
    scene.tells("crc32c")
    async with scene.serving(digests="wait", backing=None) as server:
        handle = await server.open("a")
        assert await server.read(handle) == scene.content
        blob = scene.blob(server)
        await server.disk.damage.set_digest(blob, None)  # as when it has been mended with other bytes
        gate = scene.store.block(method="digest")
        down(scene.store, method="digest")
        async with trio.open_nursery() as nursery:
            begin(nursery, unless_refused, server.content("a"))
            await reached(gate)
            scene.damage()
            down(scene.store)
            assert (await server.outcome("verify", "a"))[0] == "failed"
            assert blob.health.quarantined
            gate.set()
        await trio.sleep(1)
        assert await unless_refused(server.read(handle)) in {None, scene.content}


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
async def test_damage_in_the_cache_is_not_taken_for_the_stores(
    scene: Scene, digesting: Held, algorithm: Algorithm
) -> None:
    scene.tells(algorithm)
    async with scene.serving() as server:
        handle = await opened(server)
        await digesting.reached()
        scene.damage()
        digesting.go.set()
        await counted(server, to_compare=0)
        assert await server.read(handle) == scene.content


async def test_a_fetch_that_fails_does_not_leave_other_bytes_in_a_chunk_that_has_been_mended(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that tells only at the end that the object has been replaced."""
    store = scene.store
    writing = Held(monkeypatch, chunk_checks, "_copy", times=1)
    async with scene.serving(backing=None, cold_open="stream") as server:
        handle = await server.open("a")
        assert await server.read(handle) == scene.content
        await server.disk.journal.flush()
        scene.damage()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.integrity.scrubber.scrub, store.generation("a"))
            await writing.reached()  # chunk 0 has been fetched again
            os.truncate(scene.file, 0)
            server.release(await server.open("a"))  # finds that
            store.fail(StoreUnavailableError("fails at the end"), method="read", offset=0)
            held = store.block(method="read", offset=0, times=1)
            store._rules.reverse()  # waits, then fails
            reading = begin(nursery, unless_refused, server.read(handle, 0, 100))
            await reached(held)
            writing.go.set()
            await until(lambda: counts_of(server).repaired_chunks == 1)
            held.set()
        assert await server.read(handle, 0, 100) == scene.content[:100], reading


async def test_what_a_verify_that_is_closed_has_mended_is_compared(scene: Scene) -> None:
    scene.tells("crc32c")
    async with scene.serving() as server:
        handle = await opened(server)
        scene.damage()
        scene.damage(2)
        scene.store.corrupt("a", 77)  # one bit flips on the way
        gate = scene.store.block(method="read", key="a", offset=2 * scene.chunk_size)
        command = await server.open(await server.control_file("a", "verify"))
        await reached(gate)
        server.release(command)
        await trio.sleep(0.1)
        gate.set()
        blob = scene.blob(server)
        await trio.sleep(2)
        server.release(await server.open("a"))  # nor is it compared when it is opened
        await until(lambda: blob.health.compared)
        assert (await server.read(handle))[: scene.chunk_size] == scene.content[: scene.chunk_size], "wrong bytes"
