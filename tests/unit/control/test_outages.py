"""Commands while the store does not answer: they wait, say so, and go on by themselves or fail in time."""

import json
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support.parts import blob_files, flip_byte, until
from tests.support.served import Serving
from tests.support.stores import MemoryStore, Reticent
from tests.unit.control.common import begin, ended, jobs, last_line, on_disk
from trimsfs.control import actions
from trimsfs.errors import StoreAccessError, StoreError, TransientStoreError
from trimsfs.namespace import directory
from trimsfs.stores import circuit_breaker, recent_failures

DEADLINE_S = 0.6


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails is probed often, told of soon, and not remembered for long."""
    monkeypatch.setattr(circuit_breaker, "PROBE_INTERVAL_S", 0.05)
    monkeypatch.setattr(circuit_breaker, "TOLD_AFTER_S", 0.1)
    monkeypatch.setattr(circuit_breaker, "FORGOTTEN_AFTER_S", 0.5)
    monkeypatch.setattr(directory, "STALE_RETRY_S", 0.5)


@pytest.fixture
def serving(serving: Serving) -> Serving:
    return partial(serving, retry_deadline=DEADLINE_S)


def away(store: MemoryStore) -> None:
    store.fail(TransientStoreError("503 Slow Down"), times=float("inf"))


async def test_an_outage_is_told_before_requests_fail_at_once(serving: Serving, store: MemoryStore) -> None:
    async with serving(retry_deadline=15) as server:
        file = await server.control_file("net/params", "warm-disk")
        away(store)
        await server.open(file)
        told = None
        while told is None:
            await trio.sleep(0.02)
            told = json.loads(await server.content(".trims/control"))["store_problem"]
        assert told == "503 Slow Down"
        assert not server.components.breakers.of("").open


async def test_a_job_that_lists_again_after_an_outage_counts_what_it_cannot_read_once(serving: Serving) -> None:
    store = Reticent({"dir/a": b"a", "dir/deep/b": b"b"})
    async with serving(store=store) as server:
        await server.find("dir")
        store.fail(TransientStoreError("503"), times=float("inf"), key="dir/deep/")
        number = (await begin(server, "dir"))["id"]
        await trio.sleep(2 * DEADLINE_S)
        away(store)
        await trio.sleep(2 * DEADLINE_S)
        store.heal()
        last = await ended(server, number)
        assert (last["state"], last["failed_files"], last["total_files"]) == ("failed", 1, 2)


async def test_a_command_fails_after_the_deadline(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server:
        file = await server.control_file("net/params", "warm-disk")
        away(store)
        with trio.fail_after(5 * DEADLINE_S):
            last = await last_line(server, await server.open(file))
        assert (last["state"], last["kind"]) == ("failed", "StoreUnavailableError")


async def test_a_command_about_what_is_here_waits_for_no_store(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server:
        await server.command("warm-disk", "net/params")
        file = await server.control_file("net/params", "evict")
        await server.control_file("other/params", "warm-disk")
        away(store)
        await server.outcome("warm-disk", "other/params")
        assert (await last_line(server, await server.open(file)))["waiting"] is None


async def test_a_job_waits_as_long_as_an_outage_lasts(
    serving: Serving, store: MemoryStore, sizes: dict[str, int], chunk_size: int
) -> None:
    async with serving() as server:
        store.fail(TransientStoreError("503"), times=float("inf"), offset=4 * chunk_size)
        number = (await begin(server, "net/params"))["id"]
        await until(lambda: len(store.fetched) == 4)
        away(store)
        await trio.sleep(3 * DEADLINE_S)
        (job,) = await jobs(server)
        assert (job["state"], job["done_bytes"]) == ("waiting", 4 * chunk_size)
        assert job["waiting"].startswith("the store does not answer, waiting (")
        store.heal()
        assert (await ended(server, number))["state"] == "done"
        assert await on_disk(server, "net/params") == sizes["net/params"]


async def test_a_job_fails_when_one_object_fails_while_others_come(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server:
        store.fail(TransientStoreError("500"), times=float("inf"), key="net/params", method="read")
        number = (await begin(server, "net"))["id"]
        last = await ended(server, number)
        assert (last["state"], last["kind"], last["failed_files"]) == ("failed", "StoreUnavailableError", 1)


async def test_what_is_missing_of_a_pin_comes_after_an_outage(
    serving: Serving, store: MemoryStore, sizes: dict[str, int], tmp_path: Path
) -> None:
    async with serving() as server:
        await server.command("pin", "net/params")
    (file,) = blob_files(tmp_path / "cache")
    flip_byte(file, 0)
    away(store)
    async with serving() as server:
        await trio.sleep(2 * DEADLINE_S)
        assert await on_disk(server, "net/params") < sizes["net/params"]
        store.heal()
        await until(lambda: server.host.statistics().locked_bytes == sizes["net/params"])


async def test_a_load_that_an_outage_interrupts_is_fetched_ahead_after_it(
    serving: Serving, store: MemoryStore, chunk_size: int
) -> None:
    shards = [f"m/model-{number:05}-of-00003.safetensors" for number in range(1, 4)]
    for shard in shards:
        store.put(shard, bytes(2 * chunk_size))
    store.fail(TransientStoreError("503"), times=float("inf"), key=shards[1], method="read")
    async with serving() as server:
        handle = await server.open(shards[0])
        await server.read(handle, 0, 10)
        await until(lambda: store.count("read", shards[1]) > 0)
        away(store)
        await trio.sleep(2 * DEADLINE_S)
        store.heal()
        for _ in range(250):
            if (here := await on_disk(server, shards[1])) == 2 * chunk_size:
                break
            await trio.sleep(0.02)
        assert here == 2 * chunk_size
        server.release(handle)


@pytest.mark.parametrize("error", [TransientStoreError("500"), StoreAccessError("the token has expired")])
async def test_pins_that_the_next_server_cannot_restore_are_tried_again_until_it_can(
    serving: Serving,
    store: MemoryStore,
    sizes: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: StoreError,
) -> None:
    """Also without an outage: the store answers all else, and more often than a job would ask again."""
    monkeypatch.setattr(actions, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(recent_failures, "REMEMBERED_S", 0.01)
    monkeypatch.setattr(circuit_breaker, "FORGOTTEN_AFTER_S", 0.05)
    async with serving() as server:
        assert await server.outcome("pin", "other/params") == ("done", None)
    (file,) = blob_files(tmp_path / "cache")
    flip_byte(file, 0)
    store.fail(error, times=float("inf"), key="other/params", method="read")
    async with serving(retry_deadline=0.05) as server:
        await until(lambda: caplog.text.count("other/params: pinned, but not wholly cached") > circuit_breaker.ATTEMPTS)
        assert server.host.statistics().locked_bytes == 0
        store.heal()
        await until(lambda: server.host.statistics().locked_bytes == sizes["other/params"])


async def test_a_pin_that_is_undone_while_it_cannot_be_restored_is_not_fetched(
    serving: Serving,
    store: MemoryStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(actions, "FIRST_PAUSE_S", 0.2)
    async with serving() as server:
        assert await server.outcome("pin", "other/params") == ("done", None)
    (file,) = blob_files(tmp_path / "cache")
    flip_byte(file, 0)
    store.fail(StoreAccessError("the token has expired"), times=float("inf"), key="other/params", method="read")
    async with serving() as server:
        await until(lambda: "pinned, but not wholly cached" in caplog.text)
        assert await server.outcome("unpin", "other/params") == ("done", None)
        store.heal()
        reads = store.count("read")
        await trio.sleep(0.5)
        assert store.count("read") == reads
