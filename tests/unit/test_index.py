import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.support.parts import generation_of
from tests.support.tmpfs import tmpfs
from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.types import ChunkRecord, Generation

STORE = "memory://test"
A, B, C = (generation_of(key, key.encode() * 100) for key in "abc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.sqlite"


@pytest.fixture
def index(path: Path) -> Iterator[BlobIndex]:
    with closing(BlobIndex(path, strict=False, boot_id="this boot")) as index:
        yield index


def chunk(number: int, length: int = 100) -> ChunkRecord:
    return ChunkRecord(chunk=number, length=length, crc=0xDEADBEEF + number)


def make(index: BlobIndex, *names: str, length: int = 100) -> None:
    """Blobs of one chunk each, used in this order."""
    for name in names:
        index.add(name, STORE, generation_of(name, name.encode()))
        index.add_chunks([(name, chunk(0, length))])


def order(index: BlobIndex) -> list[str]:
    return [entry.name for entry in index.evictable(STORE)]


def arrivals(index: BlobIndex) -> list[str]:
    return [entry.name for entry in sorted(index.evictable(STORE), key=lambda entry: entry.loaded)]


# What is recorded


@pytest.mark.parametrize(
    "generation",
    [A, replace(A, version_id="v1"), replace(A, key="\udcff/ü/x"), replace(A, size=1 << 45, modified_ns=1 << 62)],
)
def test_a_generation_comes_back_as_it_was(path: Path, generation: Generation) -> None:
    with closing(BlobIndex(path, strict=False)) as index:
        index.add("a", STORE, generation)
    with closing(BlobIndex(path, strict=False)) as index:
        loaded = index.load("a")
    assert loaded is not None
    assert loaded[0].generation == generation


def test_records_survive_reopening(path: Path) -> None:
    with closing(BlobIndex(path, strict=False)) as index:
        index.add("a", STORE, A)
        index.add_chunks([("a", chunk(3, 70)), ("a", chunk(1))])
        index.set_pinned("a", True)
        index.used({"a": 1})
    with closing(BlobIndex(path, strict=False)) as index:
        assert not index.rebuilt
        loaded = index.load("a")
        assert loaded is not None
        record, chunks = loaded
        assert (record.pinned, record.uses, record.bytes) == (True, 1, 170)
        assert record.last_used > 0
        assert chunks == [chunk(1), chunk(3, 70)]
        assert index.total_bytes() == 170


def test_what_is_recorded_again_is_replaced_and_what_is_removed_is_forgotten_and_no_others(index: BlobIndex) -> None:
    def loaded(name: str) -> tuple[bool, list[ChunkRecord]] | None:
        found = index.load(name)
        return None if found is None else (found[0].pinned, found[1])

    make(index, "c", "a", "b")
    index.set_pinned("a", True)
    index.add("a", STORE, A)
    again = ChunkRecord(chunk=0, length=100, crc=1)
    index.add_chunks([("a", again), ("a", chunk(1))])
    assert [record.generation.key for record in index.records(STORE)] == ["a", "b", "c"]
    assert (loaded("a"), loaded("b")) == ((True, [again, chunk(1)]), (False, [chunk(0)]))
    index.remove_chunks("a", [1])
    assert (loaded("a"), loaded("b")) == ((True, [again]), (False, [chunk(0)]))
    index.remove("a")
    assert (index.has("a"), loaded("a"), loaded("b")) == (False, None, (False, [chunk(0)]))
    index.add("a", STORE, A)
    assert (loaded("a"), index.total_bytes()) == ((False, []), 200)


# The order of eviction


def test_what_a_policy_is_told_of_blobs_that_are_not_pinned_and_have_bytes(index: BlobIndex) -> None:
    make(index, "a", "b", "c", "pinned", "empty", length=70)
    index.add_chunks([("a", chunk(1, 30)), ("a", chunk(2, 1))])
    index.set_pinned("pinned", True)
    index.remove_chunks("empty", [0])
    assert order(index) == ["a", "b", "c"]
    index.used({"a": 2})
    index.used({"b": 1, "a": 3})
    assert order(index) == ["c", "b", "a"]
    assert [(entry.size, entry.uses) for entry in index.evictable(STORE)] == [(70, 0), (70, 1), (101, 5)]
    index.remove("a")
    make(index, "a")
    index.set_pinned("pinned", False)
    assert arrivals(index) == ["b", "c", "pinned", "a"]


def test_the_orders_of_use_and_of_arrival_go_on_after_reopening_whatever_the_clock_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(BlobIndex(path, strict=False)) as index:
        make(index, "a", "b", "c")
        index.used({"a": 1})
    monkeypatch.setattr("time.time", lambda: 1.0)
    with closing(BlobIndex(path, strict=False)) as index:
        assert order(index) == ["b", "c", "a"]
        make(index, "d")
        index.used({"b": 1})
        index.add("a", STORE, A)  # it is there already
        assert order(index) == ["c", "a", "d", "b"]
        assert arrivals(index) == ["a", "b", "c", "d"]
        assert len({entry.loaded for entry in index.evictable(STORE)}) == 4


# What blobs have in common


def similar(index: BlobIndex, name: str, *checksums: int, key: str | None = None) -> None:
    """A whole blob, its chunks with these checksums."""
    index.add(name, STORE, generation_of(key or name, bytes(100 * len(checksums))))
    index.add_chunks((name, ChunkRecord(chunk=number, length=100, crc=crc)) for number, crc in enumerate(checksums))


def test_whole_blobs_are_compared_once_the_longest_unused_first(index: BlobIndex) -> None:
    for name in "abc":
        similar(index, name, 1, 2)
    similar(index, "small", 1)
    index.remove_chunks("c", [1])
    index.used({"a": 1})
    assert index.uncompared(200) == ["b", "a"]
    index.set_compared("b", None)
    index.set_compared("unknown", None)
    assert index.uncompared(200) == ["a"]
    index.remove("b")
    similar(index, "b", 1, 2)
    assert index.uncompared(200) == ["a", "b"]


def test_twins_are_chunks_of_compared_blobs_of_the_same_length_and_checksum(index: BlobIndex) -> None:
    similar(index, "a", 1, 2, 3, 1)
    similar(index, "b", 9, 1)
    similar(index, "c", 1, 2)
    index.add_chunks([("c", ChunkRecord(chunk=1, length=99, crc=2)), ("d", ChunkRecord(chunk=0, length=100, crc=3))])
    assert index.twins("a") == [(0, None), (1, None), (2, None), (3, None)]
    index.set_compared("b", None)
    assert index.twins("a") == [(0, ("b", 1)), (1, None), (2, None), (3, ("b", 1))]
    index.set_compared("c", None)
    assert index.twins("a")[1] == (1, None)
    index.set_compared("a", None)
    index.remove("b")
    assert index.twins("a") == [(0, ("c", 0)), (1, None), (2, None), (3, ("c", 0))]


def test_blobs_of_the_same_size_are_found(index: BlobIndex) -> None:
    for name in "abcd":
        similar(index, name, *name.encode() * 2)
    similar(index, "e", 1)
    for name in "abce":
        index.set_compared(name, None)
    assert index.of_same_size("a", 4) == ["b", "c"]
    assert index.of_same_size("d", 2) == ["a", "b"]


def test_related_blobs_are_one_family(index: BlobIndex) -> None:
    for name in "abcde":
        similar(index, name, 1)
    assert index.family("a") == []
    index.set_compared("b", None)
    index.set_compared("d", "b")
    index.set_compared("a", "d")
    index.set_compared("c", None)
    index.set_compared("e", "c")
    assert index.family("a") == index.family("b") == ["a", "b", "d"]
    index.remove("b")
    assert index.family("d") == ["a", "d"]
    assert index.family("e") == ["c", "e"]


# Boots


def test_a_chunk_written_again_has_to_be_synced_again(path: Path) -> None:
    with closing(BlobIndex(path, strict=False, boot_id="one")) as index:
        make(index, "a")
        index.mark_synced("a", [0])
        index.add_chunks([("a", chunk(0))])
    with closing(BlobIndex(path, strict=False, boot_id="two")) as index:
        assert index.total_bytes() == 0


def test_the_boot_is_the_kernels_unless_told(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boot = tmp_path / "boot_id"
    monkeypatch.setattr("trimsfs.tiers.index.index.BOOT_ID", boot)
    boot.write_text("one\n")
    with closing(BlobIndex(path, strict=False)) as index:
        make(index, "a")
    with closing(BlobIndex(path, strict=False)) as index:
        assert index.total_bytes() == 100
    boot.write_text("two\n")
    with closing(BlobIndex(path, strict=False)) as index:
        assert index.total_bytes() == 0


# Damage


def damage_header(path: Path) -> None:
    path.write_bytes(b"not a database" + path.read_bytes()[14:])


def damage_table(path: Path, table: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def change_schema_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 999")


def full_index(path: Path) -> None:
    with closing(BlobIndex(path, strict=False)) as index:
        for number in range(50):
            index.add(f"token{number}", STORE, A)
            index.add_chunks([(f"token{number}", chunk(chunk_number)) for chunk_number in range(20)])
            index.mark_synced(f"token{number}", range(20))
    assert path.stat().st_size > 5 * 4096


@pytest.mark.parametrize(
    ("damage", "blobs", "chunks"),
    [
        (damage_header, 0, 0),
        (truncate, 0, 0),
        (change_schema_version, 0, 0),
        (partial(damage_table, table="meta"), 50, 1000),
        (partial(damage_table, table="blobs"), 0, 1000),
        (partial(damage_table, table="chunks"), 50, 0),
    ],
)
def test_an_index_that_cannot_be_used_is_made_anew(
    path: Path, damage: Callable[[Path], None], blobs: int, chunks: int
) -> None:
    full_index(path)
    damage(path)
    with closing(BlobIndex(path, strict=False)) as index:
        assert index.rebuilt
        assert len(index.records(STORE)) == blobs
        assert index.total_bytes() == chunks * 100
        make(index, "a")
    with closing(BlobIndex(path, strict=False)) as index:
        assert not index.rebuilt
        assert index.has("a")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_index_that_is_or_lacks_a_directory_cannot_be_used(path: Path) -> None:
    path.mkdir()
    for unusable in (path, path / "missing/index.sqlite"):
        with pytest.raises(CacheUnusableError, match=str(unusable)):
            BlobIndex(unusable, strict=False)


def test_a_full_disk_does_not_cost_the_index(tmp_path: Path) -> None:
    """Also if the host has been started again."""
    with tmpfs(tmp_path / "disk", 8 << 20) as directory:
        path = directory / "index.sqlite"
        full_index(path)
        fill(directory / "filler")
        with closing(BlobIndex(path, strict=False, boot_id="the next")) as index:
            assert len(index.records(STORE)) == 50
        (directory / "filler").unlink()
        with closing(BlobIndex(path, strict=False)) as index:
            assert len(index.records(STORE)) == 50


def test_an_index_that_was_opened_on_a_full_disk_is_checked_for_the_next_server(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 8 << 20) as directory:
        path = directory / "index.sqlite"
        full_index(path)
        fill(directory / "filler")
        with closing(BlobIndex(path, strict=False)) as index:
            (directory / "filler").unlink()
            index.rebuild()


def fill(file: Path) -> None:
    """Take all the room of a disk."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def test_somebody_elses_lock_does_not_cost_the_index(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_index(path)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", partial(connect, timeout=0.01))
    with closing(connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with contextlib.suppress(CacheUnusableError):
            BlobIndex(path, strict=False).close()
        other.rollback()
    with closing(BlobIndex(path, strict=False)) as index:
        assert len(index.records(STORE)) == 50


def test_many_blobs_are_sorted_without_a_temporary_file(index: BlobIndex, path: Path) -> None:
    """Behind the fence of a server, SQLite can make none."""
    count = 30_000
    index.add_all(STORE, {f"{n}": replace(A, key=f"directory/{n}", etag=f"{n:0128}") for n in range(count)})
    done = subprocess.run([sys.executable, "-c", FENCED, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"{count}\n", done.stderr


FENCED = f"""\
import sys
from pathlib import Path
from trimsfs.server.sandbox import fence
from trimsfs.tiers.index.index import BlobIndex

path = Path(sys.argv[1])
fence([path.parent])
print(len(BlobIndex(path, strict=False, boot_id="this boot").records({STORE!r})))
"""
