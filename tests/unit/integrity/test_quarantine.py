"""What has been found wrong stays in doubt until it has been found right, whatever else goes on."""

import os
import threading
from collections.abc import Callable
from functools import partial

import pytest
import trio

from tests.support.held import Held, begin
from tests.support.parts import until
from tests.support.served import FakeBacking, Server
from tests.unit.integrity.common import DAMAGED, Scene, counted, counts_of, down, opened
from trimsfs.errors import BlobDamagedError
from trimsfs.handover.ledger import Ledger
from trimsfs.tiers.blob import Blob


async def test_what_differs_still_is_still_in_doubt(
    server: Server, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.RETRY_INTERVAL_S", 0.1)
    scene.tells("sha256", b"something else")
    await opened(server)
    await counted(server, doubtful=1)
    assert await server.outcome("verify", "a") == DAMAGED
    differing = counts_of(server).differing
    await until(lambda: counts_of(server).differing > differing + 1)  # it has been tried again
    for command in ("pin", "warm-host"):
        assert await server.outcome(command, "a") == DAMAGED
    with pytest.raises(BlobDamagedError):
        await server.open("a")


@pytest.mark.parametrize("wrong", ["bytes", "digest"])
async def test_what_the_store_gives_wrong_twice_is_given_to_nobody_and_not_fetched_again_for_a_while(
    server: Server, scene: Scene, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    scene.tells("crc32c", b"something else" if wrong == "digest" else None)
    scene.store.corrupt("a", 77, times=1000 if wrong == "bytes" else 0)
    with pytest.raises(BlobDamagedError) as caught:
        await server.open("a")
    problem = await server.attribute("a", "problem")
    assert problem == str(caught.value)
    assert problem.startswith("a: digest mismatch: the store's bytes do not match its digest crc32c:")
    assert problem.endswith(
        ": put the right bytes back, or push the version anew under another name; then `trimsfs refresh`"
    )
    reads = scene.store.count("read")
    for _ in range(3):
        await trio.sleep(0.1)
        with pytest.raises(BlobDamagedError, match="a: digest mismatch: the store's bytes do not match its digest"):
            await server.open("a")
    assert (scene.store.count("read"), counts_of(server).doubtful) == (reads, 1)
    monkeypatch.setattr("trimsfs.integrity.quarantine.REFUTED_S", 0.0)
    await counted(server, doubtful=0)
    assert await server.attribute("a", "problem") is None
    scene.tells("crc32c")
    scene.store._corruptions.clear()
    assert await server.read(await opened(server)) == scene.content


async def test_a_file_may_be_verified_while_it_is_compared(server: Server, scene: Scene, digesting: Held) -> None:
    scene.tells("md5")
    await opened(server)
    await digesting.reached()
    assert await server.outcome("verify", "a") == ("done", None)
    digesting.go.set()
    await counted(server, compared=2)
    assert counts_of(server).to_compare == 0


async def test_what_comes_while_its_predecessor_is_compared_is_compared_too(
    server: Server, scene: Scene, digesting: Held
) -> None:
    digest = scene.tells("md5")
    server.release(await opened(server))
    await digesting.reached()
    assert await server.outcome("evict", "a") == ("done", None)
    scene.store.corrupt("a", 77)
    handle = await opened(server)
    digesting.go.set()
    await counted(server, repaired_chunks=1, to_compare=0)
    assert await server.read(handle) == scene.content
    assert await server.attribute("a", "digest") == str(digest)


async def test_two_may_check_a_copy_at_once(server: Server, scene: Scene) -> None:
    await opened(server)
    scene.damage()
    down(scene.store, method="read")
    assert await server.outcome("verify", "a") == DAMAGED
    scene.store.heal()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(server.command, "verify", "a")
    assert counts_of(server).doubtful == 0
    await server.open("a")


async def test_the_next_server_knows_what_is_in_doubt(scene: Scene, ledger: Callable[[], Ledger]) -> None:
    backing = FakeBacking()
    serving = partial(scene.serving, backing=backing)
    async with serving(ledger=ledger()) as server:
        await opened(server)
        scene.damage()
        down(scene.store, method="read")
        assert await server.outcome("verify", "a") == DAMAGED
    async with serving(ledger=ledger()) as server:
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        scene.store.heal()
        await counted(server, doubtful=0)
        assert await server.content("a") == scene.content
    backing.dispose()


async def test_the_next_server_knows_what_is_in_doubt_and_not_passed_through(
    scene: Scene, ledger: Callable[[], Ledger]
) -> None:
    scene.tells("sha256", b"something else")
    serving = partial(scene.serving, backing=None, cold_open="stream")
    async with serving(ledger=ledger()) as server:
        handle = await server.open("a")
        await server.read(handle, 0, 10)
        await counted(server, doubtful=1)
    async with serving(ledger=ledger()) as server:
        with pytest.raises(BlobDamagedError):
            await server.read(handle)
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        assert counts_of(server).doubtful == 1


async def test_a_file_that_has_been_cut_off_is_opened_by_several(server: Server, scene: Scene) -> None:
    server.release(await opened(server))
    os.truncate(scene.file, 100)

    async def read(thread: int) -> bytes:
        number = await server.number("a", thread=thread)
        return await server.read(await server.open_inode(number, thread=thread))

    async with trio.open_nursery() as nursery:
        readings = [begin(nursery, read, thread) for thread in (1, 2, 3)]
    assert readings == [[scene.content]] * 3


async def test_a_file_that_has_been_cut_off_while_it_is_synced_is_fetched_again(
    server: Server, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.release(await opened(server))
    await server.disk.journal.flush()
    synced = threading.Event()
    monkeypatch.setattr(Blob, "sync", lambda _: synced.wait(20))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.disk.journal.sync)
        await until(lambda: server.users() == 1)
        os.truncate(scene.file, 100)
        reading = begin(nursery, server.content, "a")
        await trio.sleep(0.1)
        synced.set()
    assert reading == [scene.content]


async def test_who_gives_up_has_what_was_mended_told(
    server: Server, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = trio.Event()

    async def repaired(_generation: object) -> None:
        reported.set()

    await opened(server)
    monkeypatch.setattr(server.gpu, "compare", repaired)
    scene.damage()
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            async def give_up() -> None:
                await counted(server, repaired_chunks=1)
                scope.cancel()

            nursery.start_soon(give_up)
            async with server.disk.blobs.inspecting(scene.store.generation("a")) as blob:
                await server.integrity.repair.check(blob, rate=scene.chunk_size)
    assert scope.cancelled_caught
    assert reported.is_set()


async def test_what_is_scrubbed_can_be_evicted(scene: Scene) -> None:
    async with scene.serving(scrub_interval=0.1) as server:
        server.integrity.scrubber._rate = 2 * scene.chunk_size
        server.release(await opened(server))
        await until(lambda: counts_of(server).scrubbed_bytes >= scene.chunk_size)
        assert await server.outcome("evict", "a") == ("done", None)
        assert (await server.disk.residencies.of(scene.store.generation("a"))).disk_bytes == 0
        await until(lambda: server.users() == 0)


async def test_what_an_earlier_server_left_is_mended_by_verify_or_it_says_why_not(scene: Scene) -> None:
    async with scene.serving() as server:
        server.release(await opened(server))
    scene.damage()
    async with scene.serving(backing=FakeBacking()) as server:
        last = (await server.command("verify", ""))[-1]
        assert last["error"] == "a: local copy was damaged, chunks refetched: 1"
        assert (await server.disk.residencies.of(scene.store.generation("a"))).disk_bytes == len(scene.content)
        assert server.disk.statistics().used_bytes == len(scene.content)
        assert await server.outcome("verify", "a") == ("done", None)
    scene.damage()
    down(scene.store, method="read")
    async with scene.serving(backing=FakeBacking()) as server:
        last = (await server.command("verify", "a"))[-1]
        assert last["error"].startswith(
            "a: 1 damaged chunks of its local copy were removed, and cannot be fetched now: "
        )
        assert server.disk.statistics().used_bytes < len(scene.content)
        scene.store.heal()
        assert await server.content("a") == scene.content
