"""An index in which bits have changed: wrong records are dropped, and the rest is kept."""

import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio

from tests.support.chunks import SMALL_CHUNK
from tests.support.parts import (
    content_of,
    fill,
    generation_of,
    opened,
    piece,
    recorded_bytes,
    store_chunk,
    verify_chunk,
)
from trimsfs.tiers.blob import ChunkState
from trimsfs.tiers.index.index import BlobIndex

KEYS = "abcde"


@pytest.fixture
def contents(chunk_size: int) -> dict[str, bytes]:
    return {key: content_of(key, number * chunk_size + 100) for number, key in enumerate(KEYS)}


@pytest.fixture
async def cache(tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with some blobs, one of which is pinned."""
    monkeypatch.setattr("trimsfs.tiers.disk.crash_recovery.SLACK", 4096)
    directory = tmp_path / "cache"
    async with opened(directory) as tier:
        for key, content in contents.items():
            await fill(tier, key, content)
        async with tier.blobs.using(generation_of("b", contents["b"])) as blob:
            await tier.residencies.pin(blob, True)
    return directory


def flip_bits(path: Path, draw: random.Random) -> None:
    """Change one bit or some, where something is."""
    raw = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(raw) if byte]
    for place in draw.sample(places, draw.choice([1, 1, 1, 2, 5])):
        raw[place] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 800), marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.timeout(600)
async def test_no_bit_of_the_index_that_changes_makes_a_byte_wrong_or_a_server_fail(
    seeds: range, cache: Path, contents: dict[str, bytes], tmp_path: Path
) -> None:
    for seed in seeds:
        copy = tmp_path / "copy"
        shutil.copytree(cache, copy)
        await trio.to_thread.run_sync(flip_bits, copy / "index.sqlite", random.Random(seed))
        try:
            await go_on_with(copy, contents)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        shutil.rmtree(copy)


async def go_on_with(cache: Path, contents: dict[str, bytes]) -> None:
    """Settle, read all, and evict all."""
    async with opened(cache) as tier:
        await tier._maintenance._recover()
        assert tier.statistics().used_bytes == await recorded_bytes(tier)
        for key, content in contents.items():
            async with tier.blobs.using(generation_of(key, content)) as blob:
                for chunk, state in enumerate(blob.states):
                    if state != ChunkState.UNVERIFIED or not await verify_chunk(tier, blob, chunk):
                        assert await store_chunk(tier, blob, chunk, piece(content, chunk))
                assert blob.view(0, len(content)) == content
                await tier.residencies.pin(blob, False)
        assert tier.statistics().used_bytes == await recorded_bytes(tier) == sum(map(len, contents.values()))
        for key, content in contents.items():
            assert await tier.residencies.evict(generation_of(key, content)) == len(content)
        assert tier.statistics().used_bytes == 0


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE blobs SET key = CAST('other' AS BLOB) WHERE key = CAST('c' AS BLOB)",
        "UPDATE blobs SET size = size + 1 WHERE key = CAST('c' AS BLOB)",
        "UPDATE blobs SET etag = CAST(X'FF61' AS TEXT) WHERE key = CAST('c' AS BLOB)",
        "UPDATE blobs SET sequence = 9223372036854775807 WHERE key = CAST('c' AS BLOB)",
        "UPDATE blobs SET pinned = 2 WHERE key = CAST('c' AS BLOB)",
        "UPDATE chunks SET token = 'nobody' WHERE token = (SELECT token FROM blobs WHERE key = CAST('c' AS BLOB))",
        "UPDATE chunks SET chunk = chunk + 7 WHERE token = (SELECT token FROM blobs WHERE key = CAST('c' AS BLOB))",
        "UPDATE chunks SET bytes = 1 << 40 WHERE token = (SELECT token FROM blobs WHERE key = CAST('c' AS BLOB))",
        "UPDATE chunks SET crc = -1 WHERE token = (SELECT token FROM blobs WHERE key = CAST('c' AS BLOB))",
    ],
)
async def test_records_that_cannot_be_right_are_dropped_and_no_others(
    change: str, cache: Path, contents: dict[str, bytes]
) -> None:
    with closing(sqlite3.connect(cache / "index.sqlite")) as connection, connection:
        connection.execute(change)
    with closing(BlobIndex(cache / "index.sqlite", chunk_size=SMALL_CHUNK)) as index:
        assert not index.rebuilt
    async with opened(cache) as tier:
        here = {one.generation.key: one.disk_bytes for one in await tier.residencies.all() if one.disk_bytes}
        assert here == {key: len(content) for key, content in contents.items() if key != "c"}
    await go_on_with(cache, contents)


async def test_a_server_that_takes_over_does_not_check_again(cache: Path) -> None:
    with closing(sqlite3.connect(cache / "index.sqlite")) as connection, connection:
        connection.execute("UPDATE blobs SET pinned = 2")
    with closing(BlobIndex(cache / "index.sqlite", chunk_size=SMALL_CHUNK, trusted=True)) as index:
        assert len(index.records("memory://test")) == len(KEYS)
    with closing(BlobIndex(cache / "index.sqlite", chunk_size=SMALL_CHUNK)) as index:
        assert index.records("memory://test") == []


async def test_an_index_that_was_being_made_anew_is_made_anew_again(cache: Path, contents: dict[str, bytes]) -> None:
    index = cache / "index.sqlite"
    index.rename(f"{index}-damaged")
    with closing(BlobIndex(cache / "other.sqlite", chunk_size=SMALL_CHUNK)):
        (cache / "other.sqlite").rename(index)  # as far as a server had come that was killed
    async with opened(cache) as tier:
        assert tier.index.rebuilt
        assert {here.generation.key for here in await tier.residencies.all()} == set(contents)
    assert not [name for name in os.listdir(cache) if "damaged" in name]


async def test_pins_outlive_a_damaged_index(cache: Path) -> None:
    with (cache / "index.sqlite").open("r+b") as file:
        (page,) = schema_pages(cache, "chunks")
        file.seek((page - 1) * 4096)
        file.write(b"\xa5" * 4096)
    async with opened(cache) as tier:
        assert tier.index.rebuilt
        assert [here.generation.key for here in await tier.residencies.all() if here.pinned] == ["b"]


def schema_pages(cache: Path, *tables: str) -> list[int]:
    with closing(sqlite3.connect(cache / "index.sqlite")) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        return [connection.execute(query, (table,)).fetchone()[0] for table in tables]
