"""What the interfaces of the disk tier promise, whatever its cache directory is like. Every tier is a real one."""

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from tests.support.parts import content_of, failing, fill, generation_of, opened, piece, states, written
from trimsfs.errors import CacheUnusableError, InUseError
from trimsfs.origins import Origins
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.disk.interfaces import (
    BlobUse,
    ChunkChecks,
    ChunkWrites,
    Durability,
    FileOpens,
    Inspection,
    KnownBlobs,
    Residencies,
    Retention,
    Room,
)
from trimsfs.tiers.disk.lock import lock_directory
from trimsfs.types import Generation

MISSING, UNVERIFIED, VERIFIED = ChunkState
KEY = "a/model"


@asynccontextmanager
async def inherited(cache: Path) -> AsyncIterator[DiskTier]:
    """An earlier server has left a blob and the lock."""
    async with opened(cache) as before:
        await fill(before, "a/old", b"old")
    async with opened(cache, lock=lock_directory(cache)) as tier:
        yield tier


@asynccontextmanager
async def unusable(cache: Path) -> AsyncIterator[DiskTier]:
    """An earlier server has left the lock, and the index cannot be opened."""
    (cache / "index.sqlite").mkdir(parents=True)
    async with opened(cache, lock=lock_directory(cache)) as tier:
        assert tier.unusable is not None
        yield tier


def of_several_stores(cache: Path) -> AbstractAsyncContextManager[DiskTier]:
    """A mount has one store at ``a``, another at ``b``."""
    return opened(cache, store=Origins({"a/": ("memory://a", "a/"), "b/": ("memory://b", "b/")}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of tier: whether it ``keeps`` what is written, and whether its index ``tells`` what there is."""

    made: Callable[[Path], AbstractAsyncContextManager[DiskTier]]
    keeps: bool = True
    tells: bool = True


KINDS = {
    "new": Kind(made=opened),
    "inherited": Kind(made=inherited),
    "several-stores": Kind(made=of_several_stores),
    "no-room": Kind(made=lambda cache: opened(cache, budget=0), keeps=False),
    "unusable": Kind(made=unusable, keeps=False, tells=False),
}
KEEPING = {name: kind for name, kind in KINDS.items() if kind.keeps}
keeping = pytest.mark.parametrize("kind", KEEPING.values(), ids=list(KEEPING), indirect=True)


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
async def tier(kind: Kind, tmp_path: Path) -> AsyncIterator[DiskTier]:
    async with kind.made(tmp_path / "cache") as tier:
        yield tier


@pytest.fixture
def content(chunk_size: int) -> bytes:
    return content_of(KEY, 5 * chunk_size // 2)


@pytest.fixture
def model(content: bytes) -> Generation:
    return generation_of(KEY, content)


# The type checker compares each component with its interfaces here.


@pytest.fixture
def known(tier: DiskTier) -> KnownBlobs:
    return tier.blobs


@pytest.fixture
def use(tier: DiskTier) -> BlobUse:
    return tier.blobs


@pytest.fixture
def opens(tier: DiskTier) -> FileOpens:
    return tier.blobs


@pytest.fixture
def inspection(tier: DiskTier) -> Inspection:
    return tier.blobs


@pytest.fixture
def writes(tier: DiskTier) -> ChunkWrites:
    return tier.space


@pytest.fixture
def room(tier: DiskTier) -> Room:
    return tier.space


@pytest.fixture
def checks(tier: DiskTier) -> ChunkChecks:
    return tier.damage


@pytest.fixture
def durability(tier: DiskTier) -> Durability:
    return tier.journal


@pytest.fixture
def residencies(tier: DiskTier) -> Residencies:
    return tier.residencies


@pytest.fixture
def retention(tier: DiskTier) -> Retention:
    return tier.residencies


async def put(writes: ChunkWrites, blob: Blob, content: bytes) -> None:
    """Write a whole blob."""
    for chunk in range(len(blob.states)):
        data = piece(content, chunk)
        assert await writes.reserve(blob, len(data))
        writes.wrote(blob, written(blob, chunk, data))


def used_of(room: Room) -> int:
    """Bytes of models on the disk, with what is reserved."""
    total, free = room.sizes()
    return total - free


def recorded(cache: Path, blob: Blob) -> list[int]:
    """The chunks of a blob that another process finds in the index."""
    with closing(sqlite3.connect(cache / "index.sqlite")) as index:
        return [chunk for (chunk,) in index.execute("SELECT chunk FROM chunks WHERE token = ?", (blob.token,))]


# KnownBlobs


async def test_a_token_names_a_content_by_whatever_name_it_is_opened(known: KnownBlobs, model: Generation) -> None:
    token = known.token(model)
    assert token == known.token(replace(model, key="a/link", linked=KEY)) == known.token(replace(model, version_id="v"))
    others = [replace(model, etag="other"), replace(model, key="a/other"), replace(model, size=model.size + 1)]
    assert len({token, *map(known.token, others)}) == 4
    assert token.isalnum()  # it is the name of a file


async def test_a_blob_is_known_while_somebody_holds_it(known: KnownBlobs, use: BlobUse, model: Generation) -> None:
    assert known.known(known.token(model)) is None
    assert list(known) == []
    async with use.using(model) as blob:
        assert known.known(known.token(model)) is blob
        assert list(known) == [blob]


# BlobUse


async def test_all_who_hold_a_content_at_once_have_one_blob(use: BlobUse, model: Generation) -> None:
    held: list[Blob] = []

    async def hold() -> None:
        held.append(await use.acquire(model))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(hold)
    assert len(held) == 5
    assert {id(blob) for blob in held} == {id(held[0])}
    assert held[0].users == 5
    for blob in held:
        use.release(blob)
    assert held[0].users == 0


async def test_a_block_that_is_cancelled_holds_a_blob_no_longer(use: BlobUse, model: Generation) -> None:
    with trio.CancelScope() as scope:
        async with use.using(model) as blob:
            assert blob.users == 1
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert blob.users == 0


async def test_blobs_that_are_recalled_come_in_order_and_are_held_by_nobody(use: BlobUse, model: Generation) -> None:
    other = generation_of("a/other", b"other")
    async with use.using(other) as held:
        blobs = await use.recall([model, other])
        assert [blob.generation for blob in blobs] == [model, other]
        assert blobs[1] is held
        assert [blob.users for blob in blobs] == [0, 1]


@keeping
async def test_only_who_says_so_gets_chunks_of_an_earlier_server_as_verified(
    kind: Kind, model: Generation, content: bytes, tmp_path: Path
) -> None:
    async with kind.made(tmp_path / "cache") as before, before.blobs.using(model) as blob:
        await put(before.space, blob, content)
    for checked, state in ((False, UNVERIFIED), (True, VERIFIED)):
        async with kind.made(tmp_path / "cache") as later:
            use: BlobUse = later.blobs
            [blob] = await use.recall([model], checked=checked)
            assert states(blob) == [state] * 3


# FileOpens


async def test_an_unchanged_blob_is_used_without_waiting(opens: FileOpens, model: Generation) -> None:
    async with opens.using(model) as blob:
        assert opens.unchanged(blob)
        opens.use(blob, model)
        assert blob.users == 2
        opens.release(blob)
    assert not opens.unchanged(Blob(opens.token(model), model))  # not the tier's


async def test_bytes_are_fetched_by_the_name_that_a_program_used_last(opens: FileOpens, model: Generation) -> None:
    link = replace(model, key="a/link", linked=KEY)
    async with opens.using(model) as blob:
        opens.use(blob, link)
        assert blob.generation == link
        opens.release(blob)


@keeping
async def test_a_file_that_another_program_has_changed_takes_a_wait(
    opens: FileOpens, model: Generation, tmp_path: Path
) -> None:
    async with opens.using(model) as blob:
        token = blob.token
        blob.close_file()
        os.truncate(tmp_path / "cache" / "blobs" / token[:2] / token, 1)
        assert not opens.unchanged(blob)


# Inspection


async def test_who_looks_at_a_blob_holds_it_and_records_no_use(
    inspection: Inspection, use: BlobUse, residencies: Residencies, kind: Kind, model: Generation
) -> None:
    async with inspection.inspecting(model) as blob:
        assert blob.users == 1
        async with inspection.inspecting_cached(model) if kind.tells else inspection.inspecting(model) as same:
            assert same is blob
            assert blob.users == 2
    assert blob.users == 0
    assert (await residencies.of(model)).uses == 0
    async with use.using(model):
        pass
    assert (await residencies.of(model)).uses == int(kind.tells)


async def test_who_looks_at_what_is_not_cached_makes_nothing(
    inspection: Inspection, kind: Kind, model: Generation
) -> None:
    if kind.tells:
        async with inspection.inspecting_cached(model) as blob:
            assert blob is None
    else:
        with pytest.raises(CacheUnusableError, match="cannot be looked at now"):
            async with inspection.inspecting_cached(model):
                pass
    assert list(inspection) == []


# ChunkWrites and Room


@keeping
async def test_what_is_written_to_reserved_space_is_served(
    writes: ChunkWrites, room: Room, use: BlobUse, model: Generation, content: bytes
) -> None:
    used = used_of(room)
    async with use.using(model) as blob:
        data = piece(content, 1)
        assert await writes.reserve(blob, len(data))
        record = written(blob, 1, data)
        assert states(blob) == [MISSING] * 3
        writes.wrote(blob, record)
        assert states(blob) == [MISSING, VERIFIED, MISSING]
        assert bytes(blob.view(*blob.span_of(1))) == data
        assert used_of(room) == used + len(data)


@keeping
async def test_a_chunk_that_is_written_twice_counts_once(
    writes: ChunkWrites, room: Room, use: BlobUse, model: Generation, content: bytes
) -> None:
    used = used_of(room)
    async with use.using(model) as blob:
        await put(writes, blob, content)
        await put(writes, blob, content)
    assert used_of(room) == used + len(content)


async def test_space_that_is_returned_or_declined_counts_for_nothing(
    writes: ChunkWrites, room: Room, use: BlobUse, kind: Kind, model: Generation, chunk_size: int
) -> None:
    used = used_of(room)
    async with use.using(model) as blob:
        assert await writes.reserve(blob, chunk_size) == kind.keeps
        if kind.keeps:
            assert used_of(room) == used + chunk_size
            writes.unreserve(blob, chunk_size)
        else:
            assert writes.refused(blob) is None  # no tenant has a share
        assert states(blob) == [MISSING] * 3
        assert used_of(room) == used


@keeping
async def test_after_the_last_try_of_a_write_no_space_is_given_for_a_while(
    writes: ChunkWrites, room: Room, use: BlobUse, model: Generation, chunk_size: int
) -> None:
    used = used_of(room)
    async with use.using(model) as blob:
        assert await writes.reserve(blob, chunk_size)
        await writes.write_failed(blob, chunk_size, OSError(5, "broken"), last=True)
        assert used_of(room) == used
        assert room.full(model)
        assert not await writes.reserve(blob, chunk_size)


async def test_what_is_here_needs_no_room(room: Room, model: Generation, chunk_size: int) -> None:
    assert room.room_ahead(model, 3 * chunk_size) >= 3 * chunk_size
    total, free = room.sizes()
    assert total >= free >= 0


# ChunkChecks


@keeping
async def test_a_chunk_is_discarded_if_its_bytes_are_not_those_that_were_written(
    checks: ChunkChecks, writes: ChunkWrites, room: Room, use: BlobUse, model: Generation, content: bytes
) -> None:
    async with use.using(model) as blob:
        await put(writes, blob, content)
        used = used_of(room)
        assert await checks.check_chunk(blob, 0, blob.crc(0))
        for wrong in (blob.crc(0) ^ 1, None):
            chunk = 1 if wrong is None else 0
            assert not await checks.check_chunk(blob, chunk, wrong)
            assert blob.states[chunk] == MISSING
        assert not await checks.check_chunk(blob, 0, blob.crc(0))  # it is missing, whatever its sum
        assert states(blob) == [MISSING, MISSING, VERIFIED]
        assert used_of(room) == used - blob.length_of(0) - blob.length_of(1)


@keeping
async def test_chunks_that_a_truncation_has_left_as_holes_are_discarded(
    checks: ChunkChecks, writes: ChunkWrites, use: BlobUse, model: Generation, content: bytes, chunk_size: int
) -> None:
    async with use.using(model) as blob:
        await put(writes, blob, content)
        await checks.check_holes(blob)
        assert states(blob) == [VERIFIED] * 3
        os.truncate(blob.fileno(), chunk_size)
        os.truncate(blob.fileno(), len(content))
        await checks.check_holes(blob)
        assert states(blob) == [VERIFIED, MISSING, MISSING]


# Durability


@keeping
async def test_chunks_are_in_the_index_once_that_was_waited_for(
    durability: Durability, writes: ChunkWrites, use: BlobUse, model: Generation, content: bytes, tmp_path: Path
) -> None:
    async with use.using(model) as blob:
        await put(writes, blob, content)
        assert recorded(tmp_path / "cache", blob) == []
        await durability.wait_until_recorded(blob)
        assert recorded(tmp_path / "cache", blob) == [0, 1, 2]


@keeping
async def test_who_waits_for_an_index_that_cannot_be_written_is_told(
    tier: DiskTier,
    durability: Durability,
    writes: ChunkWrites,
    use: BlobUse,
    model: Generation,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with use.using(model) as blob:
        await put(writes, blob, content)
        with monkeypatch.context() as patch:
            patch.setattr(tier.index, "add_chunks", failing(sqlite3.SQLITE_IOERR))
            with pytest.raises(CacheUnusableError, match="index cannot be written"):
                await durability.wait_until_recorded(blob)
        await durability.wait_until_recorded(blob)


@keeping
async def test_what_was_lost_is_not_told_to_be_on_the_disk(
    durability: Durability,
    writes: ChunkWrites,
    use: BlobUse,
    model: Generation,
    content: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_blob: Blob) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr("trimsfs.tiers.disk.budget.FULL_FOR_S", 0)  # else no space is given for a while
    async with use.using(model) as blob:
        await put(writes, blob, content)
        with monkeypatch.context() as patch:
            patch.setattr(Blob, "sync", fail)
            blob.backing_id = 1  # the kernel reads it by itself, so the chunks stay, and are marked as lost
            assert not await durability.sync_blob(blob)
            blob.backing_id = 0
        await put(writes, blob, content)
        assert await durability.sync_blob(blob)


async def test_nothing_written_needs_no_wait(durability: Durability, use: BlobUse, model: Generation) -> None:
    async with use.using(model) as blob:
        await durability.wait_until_recorded(blob)
        assert await durability.sync_blob(blob)


# Residencies


async def test_what_is_not_here_has_no_bytes(residencies: Residencies, use: BlobUse, model: Generation) -> None:
    here = await residencies.of(model)
    assert (here.generation, here.token) == (model, use.token(model))
    assert (here.disk_bytes, here.users, here.pinned, here.verified) == (0, 0, False, False)
    assert here.token not in [each.token for each in await residencies.all()]


async def test_a_residency_tells_what_was_written_until_now(
    residencies: Residencies, writes: ChunkWrites, use: BlobUse, kind: Kind, model: Generation, content: bytes
) -> None:
    link = replace(model, key="a/link", linked=KEY)
    async with use.using(model) as blob:
        if kind.keeps:
            await put(writes, blob, content)
        size = len(content) * kind.keeps
        for asked in (model, link):
            here = await residencies.of(asked)
            assert (here.generation, here.token, here.disk_bytes, here.users) == (asked, blob.token, size, 1)
        mine = [each.disk_bytes for each in await residencies.all() if each.token == blob.token]
        assert mine == ([size] if kind.tells else [])


@keeping
async def test_a_blob_was_last_used_when_it_was_released(
    residencies: Residencies, use: BlobUse, model: Generation
) -> None:
    async with use.using(model):
        acquired = (await residencies.of(model)).last_used
    released = await residencies.of(model)
    assert released.last_used > acquired
    assert released.uses == 1


# Retention


@keeping
async def test_what_is_pinned_or_in_use_stays(
    retention: Retention, writes: ChunkWrites, use: BlobUse, model: Generation, content: bytes
) -> None:
    async with use.using(model) as blob:
        await put(writes, blob, content)
        with pytest.raises(InUseError, match="is in use"):
            await retention.evict(model)
        await retention.pin(blob, True)
        assert blob.pinned
    assert (await retention.of(model)).pinned
    with pytest.raises(InUseError, match="is pinned"):
        await retention.evict(model)
    await retention.pin(blob, False)
    assert await retention.evict(model) == len(content)
    assert (await retention.of(model)).disk_bytes == 0
    assert use.known(blob.token) is None


async def test_what_is_not_here_may_be_evicted(retention: Retention, use: BlobUse, model: Generation) -> None:
    async with use.using(model):
        pass
    assert await retention.evict(model) == 0
    assert use.known(use.token(model)) is None
