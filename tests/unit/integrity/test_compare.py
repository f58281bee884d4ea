"""What is wrong is found and fetched again; what cannot be mended, nobody gets."""

import errno
import hashlib
import os
import sqlite3
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, flip_byte, until
from tests.support.served import FakeBacking, Server, Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import digest_of, opened
from trimsfs.errors import BlobDamagedError, ObjectChangedError, StoreUnavailableError
from trimsfs.integrity.compare import MOST_FRUITLESS
from trimsfs.integrity.deferred import RETRY_INTERVAL_S
from trimsfs.stores.digests import Algorithm, Digest

# Comparing with the store


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme", "md5", "sha256"])
async def test_what_is_right_is_verified(
    server: Server, store: MemoryStore, content: bytes, algorithm: Algorithm
) -> None:
    store.digests["a"] = digest_of(content, algorithm)
    handle = await opened(server)
    assert await server.read(handle) == content
    await until(lambda: server.integrity.statistics().to_compare == 0)
    assert await server.attribute("a", "digest") == f"{algorithm}:{store.digests['a'].value.hex()}"
    assert await server.attribute("a", "verified") == "true"
    assert server.integrity.statistics().compared == 1
    assert sum(store.fetched.values()) == len(content)


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme"])
async def test_what_costs_little_is_compared_before_it_is_read(
    server: Server, store: MemoryStore, content: bytes, chunk_size: int, algorithm: Algorithm
) -> None:
    store.digests["a"] = digest_of(content, algorithm)
    store.corrupt("a", 2 * chunk_size + 77)
    handle = await opened(server)
    assert await server.read(handle) == content
    found = server.integrity.statistics()
    assert (found.differing, found.repaired_chunks, found.compared, found.doubtful) == (1, 1, 1, 0)
    assert sum(store.fetched.values()) == 2 * len(content)


async def test_what_costs_more_is_compared_soon_after(server: Server, store: MemoryStore, content: bytes) -> None:
    store.digests["a"] = digest_of(content, "md5", certain=False)
    store.corrupt("a", 77)
    handle = await opened(server)
    await until(lambda: server.integrity.statistics().compared == 1)
    assert await server.read(handle) == content  # mended while it is open
    assert server.integrity.statistics().repaired_chunks == 1


async def test_it_is_compared_before_where_that_is_wanted(serving: Serving, store: MemoryStore, content: bytes) -> None:
    store.digests["a"] = digest_of(content, "md5", certain=False)
    store.corrupt("a", 77)
    async with serving(digests="wait") as server:
        handle = await opened(server)
        assert server.integrity.statistics().compared == 1
        assert await server.read(handle) == content


async def test_nothing_is_compared_where_that_is_not_wanted(serving: Serving, store: MemoryStore) -> None:
    async with serving(digests="off") as server:
        await opened(server)
        assert store.count("digest") == 0
        assert await server.attribute("a", "verified") == "true"
        assert await server.attribute("a", "digest") == ""


async def test_the_store_is_not_asked_of_what_is_mended_with_other_bytes_either(
    serving: Serving, store: MemoryStore, tmp_path: Path
) -> None:
    store.corrupt("a", 77)
    async with serving(digests="off") as server:
        await opened(server)
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
        assert server.integrity.statistics().repaired_chunks == 1
        await opened(server)
        assert store.count("digest") == 0
        assert await server.attribute("a", "verified") == "true"


async def test_small_files_are_compared_at_once(server: Server, store: MemoryStore, content: bytes) -> None:
    store.digests["small"] = digest_of(content[:1000], "md5", certain=False)
    await opened(server, "small")
    assert server.integrity.statistics().compared == 1
    await server.content("empty")


async def test_what_goes_wrong_again_and_again_is_given_to_nobody(
    server: Server, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.REFUTED_S", 0.0)
    store.digests["a"] = digest_of(content, "crc32c")
    store.corrupt("a", 77, times=1000)
    with pytest.raises(BlobDamagedError, match="a: digest mismatch: the store's bytes do not match its digest crc32c:"):
        await server.open("a")
    await until(lambda: server.integrity.statistics().doubtful == 0)  # removed
    store._corruptions.clear()
    handle = await opened(server)
    assert await server.read(handle) == content


async def test_a_copy_that_cannot_be_read_is_given_to_nobody(
    server: Server, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    store.digests["a"] = digest_of(content, "crc64nvme")
    with monkeypatch.context() as patch:
        patch.setattr("trimsfs.fetch.processes.thread_copier.compute", fails)
        with pytest.raises(BlobDamagedError, match=r"a: cannot be read from the cache: .*Input/output error"):
            await server.open("a")
        await until(lambda: server.integrity.statistics().doubtful == 0)
    assert await server.read(await opened(server)) == content
    assert (await server.attribute("a", "digest") or "").startswith("crc64nvme:")


async def test_a_digest_that_is_none_is_not_held_against_the_object(
    server: Server, store: MemoryStore, content: bytes
) -> None:
    """As the ETags of some servers."""
    store.digests["a"] = digest_of(b"something else", "md5", certain=False)
    store.digests["small"] = digest_of(b"something else", "md5", certain=False)
    handle = await opened(server)
    await until(lambda: server.integrity.statistics().to_compare == 0)
    assert await server.read(handle) == content
    assert (await server.attribute("a", "digest"), await server.attribute("a", "verified")) == ("", "true")
    await opened(server, "small")  # fetched once: such digests are not asked for any more
    assert store.reads("small") == [0]


async def test_parts_of_unknown_size_cannot_be_compared(server: Server, store: MemoryStore, content: bytes) -> None:
    store.digests["a"] = Digest(algorithm="crc64nvme", value=b"x" * 8, parts=3, certain=True)
    handle = await opened(server)
    assert await server.read(handle) == content
    assert await server.attribute("a", "digest") == ""
    assert sum(store.fetched.values()) == len(content)


@pytest.mark.parametrize("told", [True, False])
async def test_what_is_in_parts_of_a_usual_size_is_compared_too(
    serving: Serving, store: MemoryStore, content: bytes, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.stores.digests.USUAL_PART_SIZES", (20_000, 30_000))
    digest = hashlib.md5(
        b"".join(hashlib.md5(content[i : i + 30_000]).digest() for i in range(0, len(content), 30_000))
    )
    store.digests["a"] = Digest(
        algorithm="md5", value=digest.digest(), parts=3, part_size=30_000 if told else None, certain=False
    )
    store.corrupt("a", 77)
    async with serving(digests="wait") as server:
        handle = await opened(server)
        assert await server.read(handle) == content
        assert (await server.attribute("a", "digest") or "").endswith("-3")
        assert server.integrity.statistics().repaired_chunks == 1


async def test_parts_of_an_unusual_size_are_not_held_against_objects_and_soon_not_fetched_twice(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.stores.digests.USUAL_PART_SIZES", (30_000,))
    names = [f"part-{number}" for number in range(MOST_FRUITLESS + 2)]
    for name in names:
        store.put(name, content)
        store.digests[name] = Digest(algorithm="md5", value=b"x" * 16, parts=3, certain=False)
    async with serving(digests="wait") as server:
        for name in names:
            assert await server.content(name) == content
            assert await server.attribute(name, "verified") == "true"
    assert [store.reads(name).count(0) for name in names] == [2] * MOST_FRUITLESS + [1, 1]


async def test_a_store_that_is_away_is_asked_later(server: Server, store: MemoryStore, content: bytes) -> None:
    store.digests["a"] = digest_of(content, "crc32c")
    store.fail(StoreUnavailableError("the store is down"), method="digest", times=3)
    handle = await opened(server)
    assert await server.read(handle) == content
    assert await server.attribute("a", "verified") == "false"
    await until(lambda: server.integrity.statistics().compared == 1)
    assert await server.attribute("a", "verified") == "true"


async def test_the_store_is_not_asked_again_of_what_it_has_replaced(
    server: Server, store: MemoryStore, content: bytes
) -> None:
    store.digests["a"] = digest_of(content, "md5", certain=False)
    store.fail(ObjectChangedError("a: its ETag is another now"), method="digest", times=float("inf"))
    handle = await opened(server)
    assert await server.read(handle) == content
    await until(lambda: server.integrity.statistics().to_compare == 0)
    asked = store.count("digest")
    await trio.sleep(RETRY_INTERVAL_S * 1.5)
    assert store.count("digest") == asked


async def test_nothing_is_given_before_the_store_could_be_asked_where_that_is_wanted(
    serving: Serving, store: MemoryStore, content: bytes
) -> None:
    store.fail(StoreUnavailableError("the store is down"), method="digest", times=2)
    async with serving(digests="wait") as server:
        with pytest.raises(StoreUnavailableError, match="the store is down"):
            await server.open("a")
        await until(lambda: server.integrity.statistics().doubtful == 0)
        assert await server.read(await opened(server)) == content
        assert sum(store.fetched.values()) == len(content)


async def test_it_is_compared_once_in_the_life_of_a_cache(serving: Serving, store: MemoryStore, content: bytes) -> None:
    store.digests["a"] = digest_of(content, "crc32c")
    for _ in range(2):
        async with serving(backing=FakeBacking()) as server:
            await opened(server)
            assert await server.attribute("a", "verified") == "true"
    assert store.count("digest") == 1


# Checking what is on the disk


@pytest.mark.parametrize("in_use", [False, True])
async def test_damage_on_the_disk_is_found_and_mended(
    server: Server, store: MemoryStore, content: bytes, chunk_size: int, tmp_path: Path, in_use: bool
) -> None:
    store.digests["a"] = digest_of(content, "crc32c")
    handle = await opened(server)
    if not in_use:
        server.release(handle)
    (file,) = blob_files(tmp_path / "cache")
    flip_byte(file, 3 * chunk_size + 5)
    assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
    assert file.read_bytes() == content
    assert await server.outcome("verify", "a") == ("done", None)
    assert store.reads("a").count(3 * chunk_size) == 2
    assert sum(store.fetched.values()) == len(content) + chunk_size
    if in_use:
        assert await server.read(handle) == content


async def test_what_an_earlier_server_left_is_checked_too(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path
) -> None:
    async with serving(backing=FakeBacking()) as server:
        server.release(await opened(server))
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    async with serving(backing=FakeBacking()) as server:
        assert await server.outcome("verify", "") == ("failed", "BlobDamagedError")
        assert await server.read(await opened(server)) == content


async def test_what_is_damaged_is_missing_while_the_store_is_away(
    server: Server, store: MemoryStore, content: bytes, tmp_path: Path
) -> None:
    server.release(await opened(server))
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    store.fail(StoreUnavailableError("the store is down"), method="read", times=float("inf"))
    async with server.without_syncs():  # what is in use is quarantined, not dropped
        await until(lambda: server.users() == 0)
        assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
    with pytest.raises(StoreUnavailableError):
        await server.content("a")
    store.heal()
    assert await server.content("a") == content


async def test_what_is_damaged_and_in_use_is_given_to_nobody_else_while_the_store_is_away(
    server: Server, store: MemoryStore, content: bytes, tmp_path: Path
) -> None:
    handle = await opened(server)
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    store.fail(StoreUnavailableError("the store is down"), method="read", times=float("inf"))
    assert await server.outcome("verify", "a") == ("failed", "BlobDamagedError")
    with pytest.raises(BlobDamagedError, match=r"a: chunk 0 is damaged in the cache: .*the store is down"):
        await server.open("a")
    assert await server.attribute("a", "verified") == "false"
    assert server.integrity.statistics().doubtful == 1
    server.release(handle)
    store.heal()
    await until(lambda: server.integrity.statistics().doubtful == 0)
    assert await server.read(await opened(server)) == content


async def test_what_is_damaged_and_in_use_is_mended_when_the_store_is_back(
    server: Server, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.RETRY_INTERVAL_S", 0.5)
    handle = await opened(server)
    flip_byte(blob_files(tmp_path / "cache")[0], 5)
    store.fail(StoreUnavailableError("the store is down"), method="read", times=float("inf"))
    await server.command("verify", "a")
    store.heal()
    await until(lambda: server.integrity.statistics().doubtful == 0)
    assert await server.read(handle) == content
    server.release(await opened(server))


@pytest.mark.parametrize("command", ["verify", None])
async def test_copies_elsewhere_are_told_of(
    serving: Serving, content: bytes, tmp_path: Path, command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.01)
    told: list[str] = []

    async def repaired(generation: object) -> None:
        told.append(str(generation))

    async with serving(scrub_interval=0.0 if command else 0.01) as server:
        monkeypatch.setattr(server.gpu, "compare", repaired)
        server.release(await opened(server))
        flip_byte(blob_files(tmp_path / "cache")[0], 5)
        if command:
            await server.command(command, "a")
        await until(lambda: len(told) == 1)
        (file,) = blob_files(tmp_path / "cache")
        assert file.read_bytes() == content


async def test_scrubbing_finds_damage_by_itself_and_is_no_use(
    serving: Serving, store: MemoryStore, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 0.01)
    async with serving(scrub_interval=0.05) as server:
        server.release(await opened(server))
        (file,) = blob_files(tmp_path / "cache")
        await until(lambda: server.integrity.statistics().scrubbed_bytes > 2 * len(content))
        flip_byte(file, 5)
        await until(lambda: server.integrity.statistics().repaired_chunks == 1)
        assert file.read_bytes() == content
        await server.idle()
        await server.disk.flush()
        assert (await server.info("a"))["uses"] == 1
        assert os.stat(file).st_size == len(content)
        assert store.reads("a").count(0) == 2


async def test_scrubbing_rests_when_it_cannot_record_what_it_has_done(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("trimsfs.tiers.index.index.BlobIndex.scrubbed", fails)
    async with serving(scrub_interval=0.2) as server:
        server.release(await opened(server))
        await trio.sleep(1)
    assert 1 <= sum("readonly database" in message for message in caplog.messages) <= 5


async def test_scrubbing_keeps_to_its_rate(
    serving: Serving,
    content: bytes,
    chunk_size: int,
    mock_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.FLUSH_INTERVAL_S", 10.0)
    monkeypatch.setattr("trimsfs.tiers.host.memory_tier.CHECK_INTERVAL_S", 10.0)
    mock_clock.autojump_threshold = 1.0
    async with serving() as server:
        server.release(await opened(server))
        began = trio.current_time()
        async with server.disk.inspecting(server.store.generation("a")) as blob:
            await server.integrity.repair.check(blob, rate=chunk_size)
        assert trio.current_time() - began == pytest.approx(len(content) / chunk_size, rel=0.1)
