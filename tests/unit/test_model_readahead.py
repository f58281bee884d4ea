"""The rest of a model comes while its first files are read."""

import json
import sqlite3
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import content_of, until
from tests.support.served import STRANGER, FakeBacking, Server, Serving
from tests.support.stores import MemoryStore
from trimsfs.options import AccessRule, Eviction
from trimsfs.prefetch import model_readahead
from trimsfs.prefetch.load_plan import Expected, LoadPlanner

SHARDS = [f"model-{number:05}-of-00005.safetensors" for number in range(1, 6)]


def model(names: list[str], chunk_size: int, others: Mapping[str, bytes] = {}) -> MemoryStore:
    """A store with a model of two chunks a file."""
    files = {f"m/{name}": content_of(name, 2 * chunk_size) for name in names}
    return MemoryStore(files | {f"m/{name}": content for name, content in others.items()})


@pytest.fixture
def store(chunk_size: int) -> MemoryStore:
    return model(SHARDS, chunk_size)


@pytest.fixture
def serving(serving: Serving, backing: FakeBacking) -> Serving:
    """Starts a server that passes opens through, once their files are here."""
    return partial(serving, backing=backing, cold_open="wait")


def fetched(store: MemoryStore) -> list[str]:
    """The names of what was read of the model, in the order of its first read."""
    names = (request.key.removeprefix("m/") for request in store.requests if request.method == "read")
    return list(dict.fromkeys(names))


async def quiet(server: Server) -> None:
    """Wait until nothing is fetched any more."""
    for _ in range(3):
        await wait_all_tasks_blocked(0.02)
        await until(lambda: server.fetcher.statistics().in_flight == 0)


async def brought(server: Server, store: MemoryStore, count: int) -> None:
    """Wait until so many files have been asked for, and nothing is fetched any more."""
    await until(lambda: len(fetched(store)) >= count)
    await quiet(server)


async def read(server: Server, *names: str) -> None:
    for name in names:
        await server.content(f"m/{name}")
        await quiet(server)


async def test_the_next_shards_come_while_one_is_open(server: Server, store: MemoryStore) -> None:
    handle = await server.open(f"m/{SHARDS[0]}")
    await brought(server, store, 3)
    assert fetched(store) == SHARDS[:3]
    server.release(handle)


async def test_a_load_comes_ahead_though_its_first_file_was_looked_at_before(
    serving: Serving, store: MemoryStore
) -> None:
    async with serving(cold_open="stream") as server:
        for _ in range(2):
            server.release(await server.open(f"m/{SHARDS[0]}"))  # as who wants to know what kind of file it is
        await quiet(server)
        before = fetched(store)
        handle = await server.open(f"m/{SHARDS[0]}")
        await server.read(handle)
        await until(lambda: set(SHARDS[:2]) <= set(fetched(store)))
        await quiet(server)
        assert fetched(store) == [*before, *(name for name in SHARDS[:2] if name not in before)]
        server.release(handle)
        await read(server, *SHARDS[1:])
        assert all(len(offsets) == 2 for offsets in store.reads_by_key().values())


async def test_more_come_as_they_are_met_and_each_once(server: Server, store: MemoryStore) -> None:
    await read(server, SHARDS[0])
    await until(lambda: server.components.prefetcher.statistics().ahead_files >= 2)
    await read(server, SHARDS[1])
    await until(lambda: server.components.prefetcher.statistics().ahead_files >= 4)
    await quiet(server)
    assert fetched(store) == SHARDS
    await read(server, *SHARDS[2:])
    assert all(len(offsets) == 2 for offsets in store.reads_by_key().values())
    statistics = server.components.prefetcher.statistics()
    assert (statistics.ahead_files, statistics.used_files, statistics.wasted_files) == (4, 4, 0)


async def test_a_plan_that_is_made_while_the_server_stops_brings_nothing(
    serving: Serving, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, expected = trio.Event(), LoadPlanner.expected

    async def slowly(self: LoadPlanner, key: str) -> Expected:
        plan = await expected(self, key)
        begun.set()
        with trio.CancelScope(shield=True):
            await trio.sleep(0.2)
        return plan

    monkeypatch.setattr(LoadPlanner, "expected", slowly)
    async with serving() as server:
        server.release(await server.open(f"m/{SHARDS[0]}"))
        await begun.wait()
    assert set(fetched(store)) <= {SHARDS[0]}


async def test_an_index_of_shards_tells_their_order(serving: Serving, chunk_size: int) -> None:
    shards = ["x.bin", "a.bin", "k.bin", "below/b.bin"]
    weights = {"w1": "x.bin", "w2": "a.bin", "w3": "a.bin", "w4": "../../etc", "w5": 7, "w6": "k.bin", "w7": shards[3]}
    index = json.dumps({"weight_map": weights}).encode()
    store = model([*shards, "unused.bin"], chunk_size, {"model.safetensors.index.json": index})
    async with serving(store=store) as server:
        await read(server, "x.bin")
        await brought(server, store, 4)
        assert fetched(store) == ["x.bin", "model.safetensors.index.json", "a.bin", "k.bin"]
        await read(server, "a.bin")
        await brought(server, store, 5)
        assert fetched(store)[4:] == ["below/b.bin"]


async def test_an_index_that_is_opened_brings_the_first_shard(serving: Serving, chunk_size: int) -> None:
    index = json.dumps({"weight_map": {"w": "x.bin", "v": "a.bin"}}).encode()
    store = model(["x.bin", "a.bin"], chunk_size, {"model.safetensors.index.json": index})
    async with serving(store=store) as server:
        await read(server, "model.safetensors.index.json")
        await brought(server, store, 2)
        assert fetched(store) == ["model.safetensors.index.json", "x.bin"]


SURROGATE = b'{"weight_map": {"a": "\\ud800", "b": "\\u0000", "c": "..", "d": "/etc/passwd"}}'


@pytest.mark.parametrize("index", [b"", b"{", b"[]", b'{"weight_map": 3}', b"\xff\x00", b"[" * 10_000, SURROGATE])
async def test_a_damaged_index_leaves_what_the_names_tell(serving: Serving, chunk_size: int, index: bytes) -> None:
    store = model(SHARDS, chunk_size, {"model.safetensors.index.json": index})
    async with serving(store=store) as server:
        await read(server, SHARDS[0])
        await until(lambda: set(SHARDS[:3]) <= set(fetched(store)))


@pytest.mark.parametrize(
    ("opened", "wanted"),
    [("net.onnx", "net.onnx.data"), ("net.onnx", "net.onnx_data"), ("net-symbol.json", "net-0003.params")],
)
async def test_a_small_file_brings_the_large_one_that_it_describes(
    serving: Serving, chunk_size: int, opened: str, wanted: str
) -> None:
    store = model([wanted, "net-0009.params", "network.bin"], chunk_size, {opened: b"small"})
    async with serving(store=store) as server:
        await read(server, opened)
        await brought(server, store, 2)
        assert fetched(store) == [opened, wanted]


async def test_a_hint_counts_for_more_than_names(
    serving: Serving, chunk_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    hint = json.dumps({"prefetch": [SHARDS[4], "no such file"]}).encode()
    store = model(SHARDS, chunk_size, {".trims-prefetch.json": hint})
    async with serving(store=store) as server:
        await read(server, SHARDS[0])
        await brought(server, store, 3)
        assert fetched(store) == [SHARDS[0], ".trims-prefetch.json", SHARDS[4]]
    told = [record.getMessage() for record in caplog.records if record.name == "trimsfs.prefetch.load_plan"]
    assert told == ["m/.trims-prefetch.json: names files that do not exist, such as no such file"]


async def test_a_hint_switches_it_off(serving: Serving, chunk_size: int) -> None:
    store = model(SHARDS, chunk_size, {".trims-prefetch.json": b'{"prefetch": false}'})
    async with serving(store=store) as server:
        await read(server, SHARDS[0])
        await brought(server, store, 2)
        await read(server, SHARDS[1])
        assert fetched(store) == [SHARDS[0], ".trims-prefetch.json", SHARDS[1]]


async def test_off_brings_nothing(serving: Serving, store: MemoryStore) -> None:
    async with serving(prefetch="off") as server:
        await read(server, *SHARDS[:2])
    assert fetched(store) == SHARDS[:2]


async def test_directory_brings_all_of_it(serving: Serving, chunk_size: int) -> None:
    store = model(["b", "a", "c/below"], chunk_size, {"config": b"small", "d": b"small"})
    async with serving(store=store, prefetch="directory") as server:
        await read(server, "config")
        await until(lambda: set(fetched(store)) == {"config", "a", "b", "d"})
        await quiet(server)
        assert "c/below" not in fetched(store)


async def test_a_reader_of_a_part_that_closes_stops_it(serving: Serving, store: MemoryStore, chunk_size: int) -> None:
    ahead = store.block(key=f"m/{SHARDS[1]}")
    store.block(key=f"m/{SHARDS[0]}", offset=chunk_size)
    async with serving(cold_open="stream") as server:
        handle = await server.open(f"m/{SHARDS[0]}")
        await server.read(handle, 0, 10)
        await until(lambda: set(fetched(store)) == set(SHARDS[:3]))
        server.release(handle)
        await until(lambda: server.users() == 0)
        ahead.set()
        await quiet(server)
        assert set(fetched(store)) == set(SHARDS[:3])


async def test_opens_elsewhere_bring_less_and_less(serving: Serving, chunk_size: int) -> None:
    shards = [f"part.{number}" for number in range(40)]
    store = model(shards, chunk_size)
    async with serving(store=store) as server:
        jumps = [f"part.{number * 7 % 40}" for number in range(6)]
        await read(server, *jumps)
        assert len(fetched(store)) <= len(jumps) + 2 + 1


async def test_nothing_comes_for_which_there_is_no_room(serving: Serving, store: MemoryStore, chunk_size: int) -> None:
    async with serving(cache_size=3 * chunk_size) as server:
        await read(server, SHARDS[0])
        assert fetched(store) == SHARDS[:1]
        assert server.disk.statistics().evictions == 0


@pytest.mark.parametrize(("policy", "share"), [("lru", 0.25), ("never", 0)])
async def test_a_full_cache_gives_a_quarter_of_itself(
    serving: Serving, store: MemoryStore, chunk_size: int, policy: str, share: float
) -> None:
    store.put("old", content_of("old", 8 * chunk_size))
    async with serving(cache_size=8 * chunk_size, eviction=Eviction(disk=policy)) as server:
        assert server.disk.space.room_ahead(store.generation("old"), here=0) == 8 * chunk_size
        await server.content("old")
        assert server.disk.space.room_ahead(store.generation("old"), here=0) == share * 8 * chunk_size


async def test_what_the_caller_may_not_read_does_not_come(serving: Serving, store: MemoryStore) -> None:
    async with serving(access=(AccessRule(path=f"m/{SHARDS[1]}", uid=5, mode=0o400),)) as server:
        await server.content(f"m/{SHARDS[0]}", STRANGER)
        await brought(server, store, 3)
    assert fetched(store) == [SHARDS[0], SHARDS[2], SHARDS[3]]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_readahead, "IDLE_S", 0.5)


async def recorded(server: Server, files: int) -> None:
    """Wait until it has been recorded that so many files were read."""
    for _ in range(200):
        await trio.sleep(0.05)
        record = await server.disk.loads.last("m/")
        if record is not None and len(json.loads(record)) == files:
            return
    raise AssertionError(record)


async def evict(server: Server, store: MemoryStore, names: list[str]) -> None:
    for name in names:
        await server.disk.residencies.evict(store.generation(f"m/{name}"))
    store.requests.clear()


NAMES = ["e", "b", "unused", "d", "a"]
USED = ["d", "e", "a", "b"]


@pytest.mark.usefixtures("impatient")
async def test_the_last_load_is_replayed_after_a_restart_and_an_eviction(serving: Serving, chunk_size: int) -> None:
    store = model(NAMES, chunk_size)
    async with serving(store=store) as server:
        for name in USED:
            await server.content(f"m/{name}")
        await recorded(server, len(USED))
    async with serving(store=store) as server:
        await evict(server, store, NAMES)
        handle = await server.open("m/d")
        await brought(server, store, 3)
        assert fetched(store) == ["d", "e", "a"]
        second = await server.open("m/e")
        await brought(server, store, 4)
        assert fetched(store) == USED
        server.release(handle)
        server.release(second)


async def test_a_load_that_pauses_is_recorded_and_a_part_of_it_replaces_nothing(
    serving: Serving, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_readahead, "PAUSES", 200)
    async with serving() as server:
        await read(server, *SHARDS[:4])
        await recorded(server, 4)
    async with serving() as server:
        handle = await server.open(f"m/{SHARDS[3]}")
        await read(server, SHARDS[2])
        await trio.sleep(0.2)
        await recorded(server, 4)
        server.release(handle)
        await trio.sleep(0.2)
        await recorded(server, 4)
        await read(server, SHARDS[4])
        await recorded(server, 3)


async def test_a_model_that_is_loaded_again_comes_ahead_again(server: Server, store: MemoryStore) -> None:
    await read(server, *SHARDS)
    await evict(server, store, SHARDS)
    handle = await server.open(f"m/{SHARDS[0]}")
    await brought(server, store, 3)
    assert fetched(store) == SHARDS[:3]
    server.release(handle)


@pytest.mark.usefixtures("impatient")
async def test_a_load_that_begins_in_the_middle_replaces_no_record(serving: Serving, chunk_size: int) -> None:
    async with serving(store=model(NAMES, chunk_size)) as server:
        await server.disk.loads.record("m/", json.dumps([[name, None] for name in USED]))
        await read(server, *USED[2:])
        await trio.sleep(1)
        await recorded(server, len(USED))
        await read(server, *USED[:3])
        await recorded(server, 3)


@pytest.mark.usefixtures("impatient")
async def test_only_the_used_part_of_a_file_is_replayed(serving: Serving, chunk_size: int) -> None:
    store = MemoryStore({f"m/{name}": content_of(name, 6 * chunk_size) for name in "ab"})
    async with serving(store=store, cold_open="stream") as server:
        await server.content("m/a")
        gate = store.block(key="m/b", offset=3 * chunk_size)
        handle = await server.open("m/b")
        await server.read(handle, 2 * chunk_size, 10)
        server.release(handle)
        await recorded(server, 2)
        gate.set()
    async with serving(store=store) as server:
        before = await server.disk.loads.last("m/")
        assert before is not None
        (whole, part) = json.loads(before)
        assert whole == ["a", None]
        assert part[0] == "b"
        assert [2, 3] in part[1]
        await evict(server, store, ["a", "b"])
        await server.disk.loads.record("m/", json.dumps([["a", None], ["b", [[2, 3]]]]))
        handle = await server.open("m/a")
        await until(lambda: bool(store.reads("m/b")))
        await quiet(server)
        assert store.reads("m/b") == [2 * chunk_size]
        server.release(handle)


@pytest.mark.usefixtures("impatient")
async def test_a_load_is_not_idle_while_an_open_waits_for_its_file(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server, trio.open_nursery() as nursery:
        gates = [store.block(key=f"m/{name}") for name in SHARDS[:2]]
        nursery.start_soon(server.content, f"m/{SHARDS[0]}")
        await until(lambda: len(fetched(store)) >= 2)
        await trio.sleep(1)
        for gate in gates:
            gate.set()
        await until(lambda: server.components.prefetcher.statistics().ahead_files >= 2)


@pytest.mark.usefixtures("impatient")
async def test_a_long_open_is_no_end_of_its_load(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server, trio.open_nursery() as nursery:
        first, second = (store.block(key=f"m/{name}") for name in SHARDS[:2])
        here = trio.Event()

        async def hold() -> None:
            await server.open(f"m/{SHARDS[0]}")
            here.set()

        nursery.start_soon(hold)
        await until(lambda: len(fetched(store)) >= 2)
        await trio.sleep(1)
        first.set()
        await here.wait()
        nursery.start_soon(server.content, f"m/{SHARDS[1]}")
        await wait_all_tasks_blocked()
        second.set()
        await read(server, *SHARDS[2:])
        await recorded(server, len(SHARDS))


async def test_an_open_that_is_interrupted_ends_no_prefetch(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server, trio.open_nursery() as nursery:
        gates = [store.block(key=f"m/{name}") for name in SHARDS[:2]]
        opening = trio.CancelScope()

        async def be_interrupted() -> None:
            with opening:
                await server.open(f"m/{SHARDS[0]}")

        nursery.start_soon(be_interrupted)
        await until(lambda: len(fetched(store)) >= 2)
        opening.cancel()
        await wait_all_tasks_blocked()
        for gate in gates:
            gate.set()
        await until(lambda: server.components.prefetcher.statistics().ahead_files >= 2)


async def test_a_damaged_record_does_not_matter(serving: Serving, store: MemoryStore) -> None:
    for record in ["", "{", "[[]]", '[["../x", null], [7], ["a", [[2, 1]]]]', "[" * 10_000, "\ud800"[:0] + "null"]:
        async with serving() as server:
            await server.disk.loads.record("m/", record)
            await evict(server, store, SHARDS)
            await read(server, SHARDS[0])
            await brought(server, store, 3)
            assert fetched(store) == SHARDS[:3]


async def test_records_survive_a_rebuilt_index_and_a_damaged_row(
    serving: Serving, store: MemoryStore, tmp_path: Path
) -> None:
    async with serving() as server:
        await server.disk.loads.record("m/", "[]")
        await server.disk.loads.record("n/", "[]")
    index = tmp_path / "cache/index.sqlite"
    with sqlite3.connect(index) as connection:
        place = connection.execute("SELECT min(place) FROM loads").fetchone()[0]
        connection.execute("UPDATE loads SET files = x'ff' WHERE place = ?", (place,))
        connection.execute("ALTER TABLE checks RENAME TO no_checks")
    connection.close()
    async with serving() as server:
        kept = [await server.disk.loads.last(directory) for directory in ("m/", "n/")]
        assert sorted(kept, key=str) == [None, "[]"] or kept.count("[]") == 1


async def test_records_are_bounded(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.tiers.index.load_records.MOST_LOADS", 3)
    async with serving() as server:
        for number in range(6):
            await server.disk.loads.record(f"{number}/", "[]")
        kept = [await server.disk.loads.last(f"{number}/") for number in range(6)]
    assert kept == [None] * 3 + ["[]"] * 3
