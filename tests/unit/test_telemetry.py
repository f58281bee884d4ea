"""What the server measures of itself: latency histograms, counters of each model, and traces of cold opens."""

import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.support.parts import content_of
from tests.support.served import OWNER, STRANGER, FakeBacking, Server, Serving, served
from tests.support.stores import MemoryStore
from trimsfs.control import metrics
from trimsfs.control.authorisation import Caller
from trimsfs.errors import NotPermittedError, StoreAccessError, StoreUnavailableError, TransientStoreError
from trimsfs.extras.tracing.trace import covered_s
from trimsfs.filesystem.handles import OpenFile
from trimsfs.filesystem.savings import saved_bytes
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.stores.digests import Digest
from trimsfs.stores.retrying import Retrying
from trimsfs.telemetry.histogram import BOUNDS_S, Histogram
from trimsfs.telemetry.model_counters import MOST_MODELS, OTHERS, ModelCounters, model_of
from trimsfs.telemetry.open_trace import MOST_REQUESTS, Activity, OpenTrace, Spent, spanning
from trimsfs.telemetry.tracer import KEPT
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation

SHARDS = ("llama/1.safetensors", "llama/2.safetensors")
DELAY_S = 0.02


@pytest.fixture
def store(chunk_size: int) -> MemoryStore:
    return MemoryStore({key: content_of(key, 3 * chunk_size - 100) for key in (*SHARDS, "net", "a/b/c")})


@pytest.fixture
def serving(store: MemoryStore, backing: FakeBacking, tmp_path: Path, chunk_size: int) -> Serving:
    """Starts a server that passes opens through, and waits in cold ones."""
    return partial(served, store, tmp_path / "cache", chunk_size=chunk_size, backing=backing, cold_open="wait")


Samples = dict[tuple[str, tuple[str, ...]], float]


async def samples(server: Server, caller: Caller = OWNER) -> Samples:
    """The values of metrics, by name without its first word and the values of the labels."""
    text = (await server.content(".trims/metrics", caller)).decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(one.name.removeprefix("trimsfs_"), tuple(one.labels.values())): one.value for one in found}


def counts(found: Samples, histogram: str) -> dict[str, float]:
    """How many durations of each label were observed, where any were."""
    return {
        labels[0] if labels else "": value
        for (name, labels), value in found.items()
        if name == f"{histogram}_count" and value
    }


async def traces(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await server.content(".trims/traces")).splitlines()]


def generation(key: str, size: int = 100) -> Generation:
    return Generation(key=key, etag="e", size=size, modified_ns=0)


# Histograms


def test_a_duration_falls_into_the_first_bucket_that_has_it() -> None:
    histogram = Histogram()
    for seconds in (BOUNDS_S[0], BOUNDS_S[1] * 1.01, 1e6):
        histogram.observe(seconds)

    [(value, buckets, total)] = histogram.buckets()
    assert value == ""
    assert [count for _, count in buckets] == [1, 1, *[2] * (len(BOUNDS_S) - 2), 3]
    assert buckets[-1][0] == "+Inf"
    assert total == pytest.approx(BOUNDS_S[0] + BOUNDS_S[1] * 1.01 + 1e6)


async def test_opens_are_counted_once_by_what_they_waited_for(
    serving: Serving, store: MemoryStore, tmp_path: Path
) -> None:
    store.delay(DELAY_S, method="read")
    async with serving() as server:
        handles = [await server.open(SHARDS[0]) for _ in range(3)]
        found = await samples(server)
        assert counts(found, "files_open_seconds") == {"store": 1, "resident": 2}
        assert counts(found, "files_first_byte_seconds") == {"": 1}
        waited = [found["files_open_seconds_sum", (why,)] for why in ("store", "resident")]
        assert waited[0] >= DELAY_S > waited[1]
        assert found["model_opens_total", ("llama", "store")] == 1
        assert found["model_opens_total", ("llama", "host")] == 2
        for handle in handles:
            server.release(handle)


async def test_what_an_earlier_server_has_left_is_opened_from_disk_after_its_verification(
    store: MemoryStore, tmp_path: Path, chunk_size: int
) -> None:
    for number in range(2):
        backing = FakeBacking()
        async with served(
            store, tmp_path / "cache", chunk_size=chunk_size, backing=backing, cold_open="wait"
        ) as server:
            server.release(await server.open("net"))
            if number == 0:
                continue
            found = await samples(server)
            assert counts(found, "files_open_seconds") == {"verification": 1}
            assert found["model_opens_total", ("net", "disk")] == 1
            assert found["model_fetched_bytes_total", ("net",)] == 0
            assert {"verify", "announce"} <= {span["name"] for span in (await traces(server))[0]["spans"]}


async def test_the_first_byte_of_a_stream_comes_with_its_first_read(
    serving: Serving, store: MemoryStore, chunk_size: int
) -> None:
    store.delay(DELAY_S, method="read")
    async with serving(cold_open="stream") as server:
        handle = await server.open("net")
        assert counts(await samples(server), "files_first_byte_seconds") == {}
        await server.read(handle, 0, 100)
        await server.read(handle, 100, 100)
        found = await samples(server)
        assert counts(found, "files_first_byte_seconds") == {"": 1}
        assert found["files_first_byte_seconds_sum", ()] >= DELAY_S
        server.release(handle)


async def test_a_failed_open_is_counted_and_its_trace_tells_the_error(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server:
        await server.find("net")
        store.fail(StoreAccessError("denied"), times=100, method="read")
        with pytest.raises(StoreAccessError):
            await server.open("net")
        store.heal()
        found = await samples(server)
        assert counts(found, "files_open_seconds") == {"store": 1}
        assert counts(found, "store_request_seconds")["refused"] >= 1
        [trace] = await traces(server)
        assert (trace["error"], trace["done"]) == ("StoreAccessError", True)


async def test_requests_are_timed_by_their_outcome() -> None:
    retrying = Retrying(deadline_s=10, on_failure=None)
    errors = iter([TransientStoreError("busy"), None, StoreUnavailableError("away"), OSError("the disk")])

    async def attempt() -> None:
        error = next(errors)
        if error is not None:
            raise error

    await retrying.call("a", attempt)
    with pytest.raises(StoreUnavailableError):
        await retrying.call("a", attempt)
    with pytest.raises(OSError, match="the disk"):
        await retrying.call("a", attempt)
    with trio.move_on_after(0):
        await retrying.call("a", trio.sleep_forever)
    buckets = {value: found[-1][1] for value, found, _ in retrying.statistics().request_seconds.buckets()}
    assert {value: count for value, count in buckets.items() if count} == {
        "success": 1,
        "transient": 1,
        "failed": 1,
        "cancelled": 1,
    }


async def test_comparisons_are_timed_by_their_outcome(serving: Serving, store: MemoryStore) -> None:
    content = content_of("net", store.generation("net").size)
    store.digests["net"] = Digest(algorithm="md5", value=hashlib.md5(content).digest())
    async with serving(digests="wait") as server:
        server.release(await server.open("net"))
        assert counts(await samples(server), "integrity_comparison_seconds") == {"same": 1}
        assert "compare digest" in {span["name"] for span in (await traces(server))[0]["spans"]}


# Counters of models


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("resnet.params", "resnet.params"),
        ("llama/1.safetensors", "llama"),
        ("a/b/c", "a/b"),
        ("a/b/.trims/c/folded", "a/b"),
        (".trims/resnet.params/folded", "resnet.params"),
    ],
)
def test_a_model_is_a_directory_or_a_file_at_the_root(key: str, model: str) -> None:
    assert model_of(key) == model


def test_models_are_bounded_in_number() -> None:
    counters = ModelCounters()
    for number in range(2 * MOST_MODELS):
        counters.fetched(f"{number}/file", 1)
    statistics = counters.statistics({"0": 5, f"{MOST_MODELS}": 7, f"{MOST_MODELS + 1}": 8})

    assert len(statistics.fetched_bytes.values) == MOST_MODELS + 1
    assert sum(statistics.fetched_bytes.values.values()) == 2 * MOST_MODELS
    assert statistics.fetched_bytes.values[OTHERS,] == MOST_MODELS
    assert statistics.saved_bytes.values[OTHERS,] == 15
    assert statistics.saved_bytes.values["0",] == 5


async def test_bytes_are_counted_for_the_model_that_they_are_of(serving: Serving, store: MemoryStore) -> None:
    async with serving() as server:
        for key in (*SHARDS, "net"):
            server.release(await server.open(key))
        found = await samples(server)
        size = store.generation("net").size
        assert found["model_fetched_bytes_total", ("llama",)] == 2 * size
        assert found["model_fetched_bytes_total", ("net",)] == size


async def test_only_who_may_command_learns_of_models_by_metrics_and_traces(
    serving: Serving, store: MemoryStore
) -> None:
    store.put('secret\r\n"x/file', b"content")
    async with serving() as server:
        server.release(await server.open('secret\r\n"x/file'))
        assert b'trimsfs_model_opens_total{model="secret' in await server.content(".trims/metrics")
        text = await server.content(".trims/metrics", STRANGER)
        assert b"secret" not in text
        assert b"trimsfs_files_open_seconds_bucket" in text
        assert metrics.parse(text.decode())["trimsfs_files_first_byte_seconds_count"] == 1
        assert len(await traces(server)) == 1
        with pytest.raises(NotPermittedError):
            await server.content(".trims/traces", STRANGER)


def open_files(blob: Blob, threads: list[int]) -> Iterator[OpenFile]:
    inode = Inode(number=1, kind=InodeKind.OBJECT, path=blob.generation.key)
    blob.handles = len(threads)
    return (OpenFile(inode, blob, thread) for thread in threads)


def test_sharing_saves_a_copy_for_each_process_but_one() -> None:
    blob = Blob("t", generation("llama/1"))
    me = threading.get_native_id()
    unknown = 1 << 30  # no thread has this number
    assert saved_bytes(open_files(blob, [me, me]), lambda _: True) == {"llama": 0}
    assert saved_bytes(open_files(blob, [me, me, unknown, 0, 0]), lambda _: True) == {"llama": 300}
    assert saved_bytes(open_files(blob, [me, unknown]), lambda _: False) == {}
    assert saved_bytes(open_files(blob, [me]), lambda _: True) == {}


# Traces


async def test_the_spans_of_a_cold_open_explain_its_time(serving: Serving, store: MemoryStore) -> None:
    store.delay(15 * DELAY_S)
    async with serving(prefetch="off") as server:
        for key in SHARDS:
            server.release(await server.open(key))
        found = await traces(server)
        assert [trace["path"] for trace in found] == list(SHARDS)
        for trace in found:
            names = {span["name"] for span in trace["spans"]}
            assert {"index", "wait", "request", "record", "load", "announce"} <= names
            requests = [span for span in trace["spans"] if span["name"] == "request"]
            for request in requests:
                assert [part["name"] for part in request["parts"]] == ["first byte", "receive", "checksum", "write"]
                assert sum(part["duration"] for part in request["parts"]) == pytest.approx(request["duration"])
            assert trace["done"]
            assert trace["why"] == "store"
            assert covered_s(trace["spans"]) >= 0.95 * trace["duration"]
            stops = [span["start"] + span["duration"] for span in trace["spans"]]
            assert max(stops) <= trace["duration"] + 1e-6
        assert "lookup" in {span["name"] for span in found[0]["spans"]}


def test_spans_that_overlap_count_once() -> None:
    assert covered_s({"start": start, "duration": duration} for start, duration in [(3, 1), (0.5, 1.5), (0, 1)]) == 3


async def test_a_trace_of_a_stream_goes_on_until_all_has_come(
    serving: Serving, store: MemoryStore, chunk_size: int
) -> None:
    async with serving(cold_open="stream") as server:
        gate = store.block(method="read")
        handle = await server.open("net")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.read, handle, 0, 100)
            await store.arrived(1)
            [trace] = await traces(server)
            assert not trace["done"]
            assert "request" in {span["name"] for span in trace["spans"]}
            gate.set()
        await server.read(handle, chunk_size, 2 * chunk_size)
        server.release(handle)
        [trace] = await traces(server)
        assert trace["done"]
        assert sum(span["facts"]["bytes"] for span in trace["spans"] if span["name"] == "request") > 100


async def test_opens_that_wait_for_the_same_fetch_have_a_trace_each(serving: Serving, store: MemoryStore) -> None:
    store.delay(DELAY_S, method="read")
    async with serving() as server:
        number = await server.number("net")
        opens = [partial(open_once, server, number, thread) for thread in (11, 12)]
        async with trio.open_nursery() as nursery:
            for each in opens:
                nursery.start_soon(each)
        found = await traces(server)
        assert {trace["thread"] for trace in found} == {11, 12}
        assert all("request" in {span["name"] for span in trace["spans"]} for trace in found)
        assert len({trace["id"] for trace in found}) == 2


async def open_once(server: Server, number: int, thread: int) -> None:
    """Open a file and once more, as the kernel does for a thread."""
    try:
        server.release(await server.open_inode(number, thread=thread))
    except Exception:  # answered ESTALE
        server.release(await server.open_inode(await server.number("net", thread=thread), thread=thread))


async def test_no_open_is_traced_where_none_is_to_be(serving: Serving) -> None:
    async with serving(trace_opens=0.0) as server:
        server.release(await server.open("net"))
        assert await traces(server) == []
        assert counts(await samples(server), "files_open_seconds") == {"store": 1}


async def test_the_last_traces_are_kept(serving: Serving, store: MemoryStore) -> None:
    for number in range(KEPT + 3):
        store.put(f"many/{number}", b"content")
    async with serving(prefetch="off") as server:
        for number in range(KEPT + 3):
            server.release(await server.open(f"many/{number}"))
        assert [trace["path"] for trace in await traces(server)] == [f"many/{n}" for n in range(3, KEPT + 3)]


class Subject:
    """What spans may be about."""

    activity: Activity | None = None
    complete = True


def test_a_trace_takes_each_span_once_also_where_others_watch() -> None:
    subject = Subject()
    first, second = (OpenTrace("a", thread, [], kept=True) for thread in (1, 2))
    for trace in (first, second):
        trace.watch(subject)
    with spanning(subject, "request"):
        first.unwatch()
        first.watch(subject)
    with spanning(subject, "announce"):
        pass
    first.unwatch()
    second.unwatch()
    assert [span.name for span in second.spans] == ["request", "announce"]
    assert [span.name for span in first.spans] == ["request", "request", "announce"]
    assert first.spans[0].ended is not None
    assert first.spans[0].ended <= first.spans[1].began
    assert subject.activity is None


def test_a_request_tells_what_it_has_spent_also_after_the_open_is_answered() -> None:
    subject, trace = Subject(), OpenTrace("a", 1, [], kept=True)
    trace.watch(subject)
    with spanning(subject, "request") as request:
        trace.unwatch()
        spent = Spent()
        spent.first_byte = request.began
        request.spent = spent
    told = trace.facts()["spans"][-1]
    assert [part["name"] for part in told["parts"]] == ["first byte", "receive", "checksum", "write"]


def test_a_span_beyond_the_bound_ends_no_other_trace() -> None:
    subject = Subject()
    before, after = (OpenTrace("a", thread, [], kept=True) for thread in (1, 2))
    before.watch(subject)
    for _ in range(MOST_REQUESTS):
        with spanning(subject, "request"):
            pass
    with spanning(subject, "request"):  # it is left out
        before.unwatch()
        after.watch(subject)
    with spanning(subject, "announce"):
        pass
    after.unwatch()
    assert len(before.spans) == MOST_REQUESTS
    assert [span.name for span in after.spans] == ["announce"]


def test_nothing_is_kept_of_what_nobody_traces() -> None:
    subject = Subject()
    with spanning(subject, "request"):
        assert subject.activity is not None
    assert subject.activity is None
