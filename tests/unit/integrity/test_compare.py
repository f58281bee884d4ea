"""What is wrong is found and fetched again; what cannot be mended, nobody gets."""

import errno
import hashlib
import os
import sqlite3

import pytest
import trio

from tests.support.parts import failing, until
from tests.support.served import FakeBacking, Server
from tests.unit.integrity.common import DAMAGED, Scene, counted, counts_of, digest_of, down, opened
from trimsfs.errors import BlobDamagedError, ObjectChangedError, StoreUnavailableError
from trimsfs.integrity.deferred import RETRY_INTERVAL_S
from trimsfs.integrity.digest_comparison import MOST_FRUITLESS
from trimsfs.stores.digests import Algorithm, Digest

# Comparing with the store


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme", "md5", "sha256"])
async def test_what_is_right_is_verified(server: Server, scene: Scene, algorithm: Algorithm) -> None:
    digest = scene.tells(algorithm)
    handle = await opened(server)
    assert await server.read(handle) == scene.content
    await counted(server, to_compare=0, compared=1)
    assert await server.attribute("a", "digest") == f"{algorithm}:{digest.value.hex()}"
    assert await server.attribute("a", "verified") == "true"
    assert sum(scene.store.fetched.values()) == len(scene.content)


@pytest.mark.parametrize(
    ("digests", "algorithm", "before"),
    [("auto", "crc32c", True), ("auto", "crc64nvme", True), ("auto", "md5", False), ("wait", "md5", True)],
)
async def test_what_differs_is_fetched_again_before_it_is_read_or_soon_after(
    scene: Scene, digests: str, algorithm: Algorithm, before: bool
) -> None:
    """Before, if the comparison costs little or that is wanted."""
    scene.tells(algorithm)
    scene.store.corrupt("a", 2 * scene.chunk_size + 77)
    async with scene.serving(digests=digests) as server:
        handle = await opened(server)
        if not before:
            await counted(server, compared=1)
        assert await server.read(handle) == scene.content  # mended while it is open
        counts = counts_of(server)
        assert (counts.differing, counts.repaired_chunks, counts.compared, counts.doubtful) == (1, 1, 1, 0)
        assert sum(scene.store.fetched.values()) == 2 * len(scene.content)


async def test_nothing_is_compared_where_that_is_not_wanted(scene: Scene) -> None:
    """Nor is what was mended with other bytes."""
    scene.store.corrupt("a", 77)
    async with scene.serving(digests="off") as server:
        await opened(server)
        assert (await server.attribute("a", "verified"), await server.attribute("a", "digest")) == ("true", "")
        scene.damage()
        assert await server.outcome("verify", "a") == DAMAGED
        assert counts_of(server).repaired_chunks == 1
        await opened(server)
        assert scene.store.count("digest") == 0
        assert await server.attribute("a", "verified") == "true"


async def test_small_files_are_compared_at_once(server: Server, scene: Scene) -> None:
    scene.store.digests["small"] = digest_of(scene.content[:1000], "md5", certain=False)
    await opened(server, "small")
    assert counts_of(server).compared == 1
    await server.content("empty")


async def test_a_copy_that_cannot_be_read_is_given_to_nobody(
    server: Server, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    scene.tells("crc64nvme")
    with monkeypatch.context() as patch:
        patch.setattr("trimsfs.fetch.processes.thread_copier.compute", fails)
        with pytest.raises(BlobDamagedError, match=r"a: cannot be read from the cache: .*Input/output error"):
            await server.open("a")
        await counted(server, doubtful=0)
    assert await server.read(await opened(server)) == scene.content
    assert (await server.attribute("a", "digest") or "").startswith("crc64nvme:")


async def test_a_digest_that_is_none_is_not_held_against_the_object(server: Server, scene: Scene) -> None:
    """As the ETags of some servers."""
    for name in ("a", "small"):
        scene.store.digests[name] = digest_of(b"something else", "md5", certain=False)
    handle = await opened(server)
    await counted(server, to_compare=0)
    assert await server.read(handle) == scene.content
    assert (await server.attribute("a", "digest"), await server.attribute("a", "verified")) == ("", "true")
    await opened(server, "small")  # fetched once: such digests are not asked for any more
    assert scene.store.reads("small") == [0]


async def test_parts_of_unknown_size_cannot_be_compared(server: Server, scene: Scene) -> None:
    scene.store.digests["a"] = Digest(algorithm="crc64nvme", value=b"x" * 8, parts=3, certain=True)
    assert await server.read(await opened(server)) == scene.content
    assert await server.attribute("a", "digest") == ""
    assert sum(scene.store.fetched.values()) == len(scene.content)


@pytest.mark.parametrize("told", [True, False])
async def test_what_is_in_parts_of_a_usual_size_is_compared_too(
    scene: Scene, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.stores.digests.USUAL_PART_SIZES", (20_000, 30_000))
    parts = [scene.content[start : start + 30_000] for start in range(0, len(scene.content), 30_000)]
    value = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).digest()
    size = 30_000 if told else None
    scene.store.digests["a"] = Digest(algorithm="md5", value=value, parts=3, part_size=size, certain=False)
    scene.store.corrupt("a", 77)
    async with scene.serving(digests="wait") as server:
        assert await server.read(await opened(server)) == scene.content
        assert (await server.attribute("a", "digest") or "").endswith("-3")
        assert counts_of(server).repaired_chunks == 1


async def test_parts_of_an_unusual_size_are_not_held_against_objects_and_soon_not_fetched_twice(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.stores.digests.USUAL_PART_SIZES", (30_000,))
    names = [f"part-{number}" for number in range(MOST_FRUITLESS + 2)]
    for name in names:
        scene.store.put(name, scene.content)
        scene.store.digests[name] = Digest(algorithm="md5", value=b"x" * 16, parts=3, certain=False)
    async with scene.serving(digests="wait") as server:
        for name in names:
            assert await server.content(name) == scene.content
            assert await server.attribute(name, "verified") == "true"
    assert [scene.store.reads(name).count(0) for name in names] == [2] * MOST_FRUITLESS + [1, 1]


async def test_a_store_that_is_away_is_asked_later(server: Server, scene: Scene) -> None:
    scene.tells("crc32c")
    scene.store.fail(StoreUnavailableError("the store is down"), method="digest", times=3)
    assert await server.read(await opened(server)) == scene.content
    assert await server.attribute("a", "verified") == "false"
    await counted(server, compared=1)
    assert await server.attribute("a", "verified") == "true"


async def test_the_store_is_not_asked_again_of_what_it_has_replaced(server: Server, scene: Scene) -> None:
    scene.tells("md5")
    scene.store.fail(ObjectChangedError("a: its ETag is another now"), method="digest", times=float("inf"))
    assert await server.read(await opened(server)) == scene.content
    await counted(server, to_compare=0)
    asked = scene.store.count("digest")
    await trio.sleep(RETRY_INTERVAL_S * 1.5)
    assert scene.store.count("digest") == asked


async def test_nothing_is_given_before_the_store_could_be_asked_where_that_is_wanted(scene: Scene) -> None:
    scene.store.fail(StoreUnavailableError("the store is down"), method="digest", times=2)
    async with scene.serving(digests="wait") as server:
        with pytest.raises(StoreUnavailableError, match="the store is down"):
            await server.open("a")
        await counted(server, doubtful=0)
        assert await server.read(await opened(server)) == scene.content
        assert sum(scene.store.fetched.values()) == len(scene.content)


async def test_it_is_compared_once_in_the_life_of_a_cache(scene: Scene) -> None:
    scene.tells("crc32c")
    for _ in range(2):
        async with scene.serving(backing=FakeBacking()) as server:
            await opened(server)
            assert await server.attribute("a", "verified") == "true"
    assert scene.store.count("digest") == 1


# Checking what is on the disk


@pytest.mark.parametrize("in_use", [False, True])
async def test_damage_on_the_disk_is_found_and_mended(server: Server, scene: Scene, in_use: bool) -> None:
    scene.tells("crc32c")
    handle = await opened(server)
    if not in_use:
        server.release(handle)
    scene.damage(3)
    assert await server.outcome("verify", "a") == DAMAGED
    assert scene.file.read_bytes() == scene.content
    assert await server.outcome("verify", "a") == ("done", None)
    assert scene.store.reads("a").count(3 * scene.chunk_size) == 2
    assert sum(scene.store.fetched.values()) == len(scene.content) + scene.chunk_size
    if in_use:
        assert await server.read(handle) == scene.content


async def test_what_is_damaged_is_missing_while_the_store_is_away(server: Server, scene: Scene) -> None:
    server.release(await opened(server))
    scene.damage()
    down(scene.store, method="read")
    async with server.without_syncs():  # what is in use is quarantined, not dropped
        await until(lambda: server.users() == 0)
        assert await server.outcome("verify", "a") == DAMAGED
    with pytest.raises(StoreUnavailableError):
        await server.content("a")
    scene.store.heal()
    assert await server.content("a") == scene.content


async def test_what_is_damaged_and_in_use_is_given_to_nobody_else_while_the_store_is_away(
    server: Server, scene: Scene
) -> None:
    handle = await opened(server)
    scene.damage()
    down(scene.store, method="read")
    assert await server.outcome("verify", "a") == DAMAGED
    with pytest.raises(BlobDamagedError, match=r"a: chunk 0 is damaged in the cache: .*the store is down"):
        await server.open("a")
    assert await server.attribute("a", "verified") == "false"
    assert counts_of(server).doubtful == 1
    server.release(handle)
    scene.store.heal()
    await counted(server, doubtful=0)
    assert await server.read(await opened(server)) == scene.content


async def test_what_is_damaged_and_in_use_is_mended_when_the_store_is_back(
    server: Server, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.integrity.quarantine.RETRY_INTERVAL_S", 0.5)
    handle = await opened(server)
    scene.damage()
    down(scene.store, method="read")
    await server.command("verify", "a")
    scene.store.heal()
    await counted(server, doubtful=0)
    assert await server.read(handle) == scene.content
    server.release(await opened(server))


@pytest.mark.parametrize("command", ["verify", None])
async def test_copies_elsewhere_are_told_of(scene: Scene, command: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []

    async def repaired(generation: object) -> None:
        reported.append(generation)

    async with scene.serving(scrub_interval=0.0 if command else 0.01) as server:
        monkeypatch.setattr(server.gpu, "compare", repaired)
        server.release(await opened(server))
        scene.damage()
        if command:
            await server.command(command, "a")
        await until(lambda: len(reported) == 1)
        assert scene.file.read_bytes() == scene.content


async def test_scrubbing_finds_damage_by_itself_and_is_no_use(scene: Scene) -> None:
    async with scene.serving(scrub_interval=0.05) as server:
        server.release(await opened(server))
        await until(lambda: counts_of(server).scrubbed_bytes > 2 * len(scene.content))
        scene.damage()
        await counted(server, repaired_chunks=1)
        assert scene.file.read_bytes() == scene.content
        await server.idle()
        await server.disk.journal.flush()
        assert (await server.info("a"))["uses"] == 1
        assert os.stat(scene.file).st_size == len(scene.content)
        assert scene.store.reads("a").count(0) == 2


async def test_scrubbing_rests_when_it_cannot_record_what_it_has_done(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trimsfs.integrity.scrub.LOOK_INTERVAL_S", 1.0)
    monkeypatch.setattr("trimsfs.tiers.index.index.BlobIndex.scrubbed", failing(sqlite3.SQLITE_READONLY))
    async with scene.serving(scrub_interval=0.2) as server:
        server.release(await opened(server))
        await trio.sleep(1)
    assert 1 <= sum("cannot write the cache index" in message for message in caplog.messages) <= 5


async def test_scrubbing_keeps_to_its_rate(
    scene: Scene, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiers.disk.maintenance.FLUSH", "tiers.host.memory_tier.CHECK"):
        monkeypatch.setattr(f"trimsfs.{name}_INTERVAL_S", 10.0)
    mock_clock.autojump_threshold = 1.0
    async with scene.serving() as server:
        server.release(await opened(server))
        began = trio.current_time()
        async with server.disk.blobs.inspecting(scene.store.generation("a")) as blob:
            await server.integrity.repair.check(blob, rate=scene.chunk_size)
        assert trio.current_time() - began == pytest.approx(len(scene.content) / scene.chunk_size, rel=0.1)
