"""What has been found wrong stays in doubt until it has been found right, whatever else goes on."""

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, flip_byte, until
from tests.support.served import FakeBacking, Server, Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of, opened
from trimsfs.errors import BlobDamagedError, StoreUnavailableError
from trimsfs.handover.ledger import Ledger
from trimsfs.stores.digests import compute
from trimsfs.tiers.blob import Blob


class Gate:
    """Holds up digests while it is closed."""

    def __init__(self) -> None:
        self.began = 0
        self.opened = threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """One that the first digest waits at."""
    gate = Gate()

    def computed(*arguments: int) -> bytes | None:
        gate.began += 1
        if gate.began == 1:
            assert gate.opened.wait(20)
        return compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.compute", computed)
    yield gate
    gate.opened.set()


def away(store: MemoryStore) -> None:
    store.fail(StoreUnavailableError("the store is down"), method="read", times=float("inf"))


async def test_what_differs_still_is_still_in_doubt(
    server: Server, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.RETRY_INTERVAL_S", 0.1)
    store.digests["a"] = digest_of(b"something else", "sha256")
    await opened(server)
    await until(lambda: server.integrity.statistics().doubtful == 1)
    assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
    differing = server.integrity.statistics().differing
    await until(lambda: server.integrity.statistics().differing > differing + 1)  # it has been tried again
    for command in ("pin", "warm-host"):
        assert await server.outcome(command, "a") == ("failed", "BlobDamagedError")
    with pytest.raises(BlobDamagedError):
        await server.open("a")


async def test_what_the_store_gives_wrong_twice_is_not_fetched_again_for_a_while(
    server: Server, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.01)
    store.digests["a"] = digest_of(b"something else", "crc32c")
    with pytest.raises(BlobDamagedError):
        await server.open("a")
    reads = store.count("read")
    for _ in range(3):
        await trio.sleep(0.05)
        with pytest.raises(BlobDamagedError, match="a: digest mismatch: the store's bytes do not match its digest"):
            await server.open("a")
    assert (store.count("read"), server.integrity.statistics().doubtful) == (reads, 1)
    monkeypatch.setattr("trimsfs.integrity.quarantine.REFUTED_S", 0.0)
    await until(lambda: server.integrity.statistics().doubtful == 0)
    store.digests["a"] = digest_of(content, "crc32c")
    assert await server.read(await opened(server)) == content


async def test_the_problem_of_a_file_that_fails_its_digest_is_told_while_opens_fail(
    server: Server, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.digests["a"] = digest_of(b"something else", "crc32c")
    with pytest.raises(BlobDamagedError) as caught:
        await server.open("a")
    told = await server.attribute("a", "problem")
    assert told == str(caught.value)
    assert told.startswith("a: digest mismatch: the store's bytes do not match its digest crc32c:")
    assert told.endswith(
        ": put the right bytes back, or push the version anew under another name; then `trimsfs refresh`"
    )
    monkeypatch.setattr("trimsfs.integrity.quarantine.LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr("trimsfs.integrity.quarantine.REFUTED_S", 0.0)
    store.digests["a"] = digest_of(content, "crc32c")
    await until(lambda: server.integrity.statistics().doubtful == 0)
    assert await server.attribute("a", "problem") is None


async def test_a_file_may_be_verified_while_it_is_compared(
    server: Server, store: MemoryStore, content: bytes, gate: Gate
) -> None:
    store.digests["a"] = digest_of(content, "md5", certain=False)
    await opened(server)
    await until(lambda: gate.began == 1)
    assert await server.outcome("verify", "a") == ("done", None)
    gate.opened.set()
    await until(lambda: server.integrity.statistics().compared == 2)
    assert server.integrity.statistics().to_compare == 0


async def test_what_comes_while_its_predecessor_is_compared_is_compared_too(
    server: Server, store: MemoryStore, content: bytes, gate: Gate
) -> None:
    store.digests["a"] = digest_of(content, "md5", certain=False)
    server.release(await opened(server))
    await until(lambda: gate.began == 1)
    assert await server.outcome("evict", "a") == ("done", None)
    store.corrupt("a", 77)
    handle = await opened(server)
    gate.opened.set()
    await until(lambda: server.integrity.statistics().repaired_chunks == 1)
    await until(lambda: server.integrity.statistics().to_compare == 0)
    assert await server.read(handle) == content
    assert await server.attribute("a", "digest") == str(store.digests["a"])


async def test_two_may_check_a_copy_at_once(server: Server, store: MemoryStore, tmp_path: Path) -> None:
    await opened(server)
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    away(store)
    assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
    store.heal()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(server.command, "verify", "a")
    assert server.integrity.statistics().doubtful == 0
    await server.open("a")


async def test_the_next_server_knows_what_is_in_doubt(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, ledger: Callable[[], Ledger]
) -> None:
    backing = FakeBacking()
    serving = partial(serving, backing=backing)
    async with serving(ledger=ledger()) as server:
        await opened(server)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        away(store)
        assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
    async with serving(ledger=ledger()) as server:
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        store.heal()
        await until(lambda: server.integrity.statistics().doubtful == 0)
        assert await server.content("a") == content
    backing.dispose()


async def test_the_next_server_knows_what_is_in_doubt_and_not_passed_through(
    serving: Serving, store: MemoryStore, ledger: Callable[[], Ledger]
) -> None:
    store.digests["a"] = digest_of(b"something else", "sha256")
    serving = partial(serving, backing=None, cold_open="stream")
    async with serving(ledger=ledger()) as server:
        handle = await server.open("a")
        await server.read(handle, 0, 10)
        await until(lambda: server.integrity.statistics().doubtful == 1)
    async with serving(ledger=ledger()) as server:
        with pytest.raises(BlobDamagedError):
            await server.read(handle)
        with pytest.raises(BlobDamagedError):
            await server.open("a")
        assert server.integrity.statistics().doubtful == 1


async def test_a_file_that_has_been_cut_off_is_opened_by_several(
    server: Server, content: bytes, tmp_path: Path
) -> None:
    server.release(await opened(server))
    (file,) = blob_files(tmp_path / "cache")
    os.truncate(file, 100)
    found = []

    async def read(thread: int) -> None:
        handle = await server.open_inode(await server.number("a", thread=thread), thread=thread)
        found.append(await server.read(handle))

    async with trio.open_nursery() as nursery:
        for thread in (1, 2, 3):
            nursery.start_soon(read, thread)
    assert found == [content] * 3


async def test_a_file_that_has_been_cut_off_while_it_is_synced_is_fetched_again(
    server: Server, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.release(await opened(server))
    await server.disk.flush()
    synced = threading.Event()

    async def read() -> None:
        assert await server.content("a") == content

    monkeypatch.setattr(Blob, "sync", lambda _: synced.wait(20))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.disk._journal.sync)
        await until(lambda: server.users() == 1)
        (file,) = blob_files(tmp_path / "cache")
        os.truncate(file, 100)
        nursery.start_soon(read)
        await trio.sleep(0.1)
        synced.set()


async def test_who_gives_up_has_what_was_mended_told(
    server: Server, store: MemoryStore, tmp_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = trio.Event()

    async def repaired(_generation: object) -> None:
        told.set()

    await opened(server)
    monkeypatch.setattr(server.gpu, "compare", repaired)
    flip_byte(blob_files(tmp_path / "cache")[0], 5)

    async def check(scope: trio.CancelScope) -> None:
        with scope:
            async with server.disk.inspecting(store.generation("a")) as blob:
                await server.integrity.repair.check(blob, rate=chunk_size)

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(check, scope)
        await until(lambda: server.integrity.repair.repaired_chunks == 1)
        scope.cancel()
    assert scope.cancelled_caught
    assert told.is_set()


async def test_what_is_scrubbed_can_be_evicted(
    serving: Serving, store: MemoryStore, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.05)
    async with serving(scrub_interval=0.1) as server:
        server.integrity.scrubber._rate = 2 * chunk_size
        server.release(await opened(server))
        await until(lambda: server.integrity.statistics().scrubbed_bytes >= chunk_size)
        assert await server.outcome("evict", "a") == ("done", None)
        assert (await server.disk.residency(store.generation("a"))).disk_bytes == 0
        await until(lambda: server.users() == 0)


async def test_what_an_earlier_server_left_is_mended_by_verify_or_it_says_why_not(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path
) -> None:
    async with serving() as server:
        server.release(await opened(server))
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    async with serving(backing=FakeBacking()) as server:
        last = (await server.command("verify", "a"))[-1]
        assert last["error"] == "a: local copy was damaged, chunks refetched: 1"
        assert (await server.disk.residency(store.generation("a"))).disk_bytes == len(content)
        assert server.disk.statistics().used_bytes == len(content)
        assert await server.outcome("verify", "a") == ("done", None)
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    away(store)
    async with serving(backing=FakeBacking()) as server:
        last = (await server.command("verify", "a"))[-1]
        assert last["error"].startswith(
            "a: 1 damaged chunks of its local copy were removed, and cannot be fetched now: "
        )
        assert server.disk.statistics().used_bytes < len(content)
        store.heal()
        assert await server.content("a") == content
