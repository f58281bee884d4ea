"""What every store does, whatever is behind it."""

import random
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.contract.backends import Backend, S3Backend, names, pages, read
from trimsfs.errors import BucketNotFoundError, ObjectChangedError, ObjectNotFoundError, StoreError, TransientStoreError
from trimsfs.stores.base import Page, Store
from trimsfs.stores.retrying import Retrying, RetryingStore
from trimsfs.types import Buffer, Generation

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
STREAMING = ("ceph", "moto", "fake-gcs", "azurite", "hub", "oci", "oci-tar")
"""The backends whose stores answer a condition before the bytes."""

ODD_NAMES = (
    "two words",
    " leading and trailing ",
    "ünïcödé",
    "模型",
    "\N{GRINNING FACE}",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{LINE SEPARATOR}",
    "a+b",
    "100%",
    "per%20cent",
    "%2F",
    "this&that",
    "&amp;",
    "<tag>",
    'it\'s "quoted"',
    "back\\slash",
    "what?",
    "no#1",
    "a=b;c:d,e@f$g!h*i(j)k[l]m{n}o|p~q`r^s",
    "tab\there",
    "...",
    ".hidden",
    "-",
    "x" * 255,
)
CONTROLS = [f"before{chr(code)}after" for code in (*range(1, 10), *range(11, 32), 127)]
"""Names that are tried of objects only: Ceph cannot list below such a directory, nor go on with a listing after it."""


def nothing(page: Page) -> bool:
    """Whether it is the last page and names nothing."""
    return names(page) == [] and page.next_token is None


async def gives_no_other_bytes(backend: Backend, store: Store, old: Generation, content: bytes) -> None:
    """What has been replaced or deleted gives no bytes; its own, by its version, where the store keeps it."""
    for start, stop in ((0, len(content)), (len(content) - 1, len(content)), (0, 1)):
        if backend.keeps:
            assert await read(store, old, start, stop) == content[start:stop]
        if not backend.keeps or old.version_id is not None:
            with pytest.raises((ObjectChangedError, ObjectNotFoundError), match=r"\Amodel: [^\n]+\Z"):
                await read(store, replace(old, version_id=None), start, stop)


def ignore(_piece: Buffer) -> None:
    """Takes bytes that nobody needs."""


def same(got: Buffer | bytearray, expected: Buffer) -> bool:
    """Whether they are equal; pytest would take minutes to explain a difference."""
    return got == expected


# The store as a whole


async def test_an_empty_store_exists_and_what_has_nothing_under_it_does_not(backend: Backend) -> None:
    store, nowhere = backend.open(), backend.open("nowhere")
    await store.probe()
    page = await store.list_page("", limit=1)
    assert (nothing(page), page.exists) == (True, True)
    with suppress(BucketNotFoundError):  # of a directory
        assert not (await nowhere.list_page("", limit=1)).exists
    for opened in (store, nowhere):
        await opened.aclose()


async def test_missing_bucket_or_directory_is_told_and_not_taken_for_an_empty_one(backend: Backend) -> None:
    store = backend.open(missing=True)
    for request in (store.probe, partial(store.list_page, "")):
        with pytest.raises(BucketNotFoundError, match=r"missing.* does not exist"):
            await request()
    generation = Generation(key="model", etag='"x"', size=10, modified_ns=0)
    for about_an_object in (partial(store.stat, "model"), partial(read, store, generation)):
        with pytest.raises((BucketNotFoundError, ObjectNotFoundError)):
            await about_an_object()
    await store.aclose()


async def test_store_of_a_prefix_sees_what_is_below_it_by_relative_keys(backend: Backend) -> None:
    for key in ("models/eu/resnet/params", "models/eu/readme", "models/eu2/other", "models/us", "readme"):
        backend.put(key, key.encode())
    store = backend.open("models/eu")

    await store.probe()
    page = await store.list_page("")
    assert names(page) == ["readme", "resnet/"]
    assert names(await store.list_page("resnet/")) == ["resnet/params"]
    assert (await store.stat("resnet/params")).key == "resnet/params"
    for generation in (page.objects[0], await store.stat("readme")):
        assert await read(store, generation, 0, generation.size) == b"models/eu/readme"
    for outside in ("models/us", "eu2/other", "../us", "../eu2/other"):
        with pytest.raises(ObjectNotFoundError):
            await store.stat(outside)
    await store.aclose()


async def test_identity_is_equal_for_the_same_objects_only(backend: Backend) -> None:
    backend.put("a/model", b"x")
    backend.put("b/model", b"x")
    stores = [backend.open(prefix) for prefix in ("", "a", "a/", "b")]

    whole, with_prefix, with_slash, other = (store.identity for store in stores)
    assert with_prefix == with_slash
    assert len({whole, with_prefix, other}) == 3
    for store in stores:
        await store.aclose()


# Listing


async def test_listing_shows_objects_and_directories_of_one_level(backend: Backend, store: Store) -> None:
    for key in ("a", "b/c", "b/d/e", "b/d/f", "g/h/i/j"):
        backend.put(key, key.encode())

    root = await store.list_page("")
    assert ([generation.key for generation in root.objects], root.prefixes) == (["a"], ("b/", "g/"))
    below = await store.list_page("b/")
    assert ([generation.key for generation in below.objects], below.prefixes) == (["b/c"], ("b/d/",))
    assert names(await store.list_page("b/d/")) == ["b/d/e", "b/d/f"]
    assert names(await store.list_page("g/h/")) == ["g/h/i/"]
    assert {root.next_token, below.next_token} == {None}


async def test_listing_tells_size_etag_and_time_as_stat_does(backend: Backend, store: Store) -> None:
    for size in (0, 1, 1000):
        backend.put(f"model/{size}", bytes(size))

    page = await store.list_page("model/")
    assert {generation.key: generation.size for generation in page.objects} == {
        f"model/{size}": size for size in (0, 1, 1000)
    }
    for generation in page.objects:
        told = await store.stat(generation.key)
        assert replace(generation, version_id=None) == replace(told, version_id=None)


@pytest.mark.parametrize("prefix", ["none/", "none/below/", "model/", "mod/", "dir/model/"])
async def test_listing_of_what_is_no_directory_is_empty(backend: Backend, store: Store, prefix: str) -> None:
    backend.put("model", b"x")
    backend.put("dir/model", b"x")
    page = await store.list_page(prefix)
    assert (nothing(page), page.exists) == (True, False)


async def test_directory_with_nothing_in_it_exists(backend: Backend, store: Store) -> None:
    backend.make_directory("empty")
    backend.make_directory("full")
    backend.put("full/model", b"x")

    assert sorted(names(await store.list_page(""))) == ["empty/", "full/"]
    empty = await store.list_page("empty/", limit=1)
    assert (nothing(empty), empty.exists) == (True, True)
    assert (await store.list_page("full/", limit=1)).exists
    for limit in (1, 2):  # a marker of the directory is no name in it
        assert [name for page in await pages(store, "full/", limit=limit) for name in names(page)] == ["full/model"]


@pytest.mark.promise("paged listing")
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_pages_of_any_size_give_each_name_once(paged_backend: Backend, limit: int) -> None:
    backend, store = paged_backend, paged_backend.open()
    # Random, so that names of both kinds meet at the pages' ends.
    draw = random.Random(limit)
    expected = set()
    for number in range(17):
        key = f"d/{number:02}{draw.choice('aZ-')}"
        if draw.random() < 0.5:
            backend.put(key, b"x")
            expected.add(key)
        else:
            for child in range(draw.randint(1, 4)):
                backend.put(f"{key}/{child}", b"x")
            expected.add(f"{key}/")
    backend.put("e", b"x")

    found = await pages(store, "d/", limit=limit)

    assert Counter(name for page in found for name in names(page)) == Counter(expected)
    assert all(1 <= len(names(page)) <= limit for page in found)


async def test_name_may_be_an_object_and_begin_that_of_a_directory(paged_backend: Backend) -> None:
    backend, store = paged_backend, paged_backend.open()
    for key in ("net", "net.onnx", "net-v2/params", "net0/params"):
        backend.put(key, b"x")
    for limit in (1, 2, 1000):
        found = [name for page in await pages(store, limit=limit) for name in names(page)]
        assert sorted(found) == ["net", "net-v2/", "net.onnx", "net0/"]


# Objects


async def test_stat_tells_size_and_a_recent_time(backend: Backend, store: Store) -> None:
    backend.put("dir/model", bytes(12345))
    generation = await store.stat("dir/model")
    backend.put("dir/later", b"")
    later = await store.stat("dir/later")

    assert (generation.key, generation.size, later.size) == ("dir/model", 12345, 0)
    assert generation.etag
    assert 1_600_000_000 * 10**9 < generation.modified_ns <= later.modified_ns
    again = await store.stat("dir/model")
    assert generation == again or backend.keeps  # by commits, all files have the time of the last one
    assert (generation.key, generation.etag, generation.size) == (again.key, again.etag, again.size)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("none", id="no such name"),
        pytest.param("none/model", id="no such directory"),
        pytest.param("dir", id="a directory"),
        pytest.param("model/below", id="below an object"),
        pytest.param("mode", id="part of a name"),
        pytest.param("n" * 256, id="too long for a file name"),
        pytest.param("/".join(["n" * 200] * 6), id="too long for a key"),
        pytest.param("/".join(["n" * 200] * 25), id="too long for a path"),
        pytest.param("latin1-\udce9", id="not UTF-8"),
    ],
)
async def test_what_cannot_be_there_is_not_found(backend: Backend, store: Store, key: str) -> None:
    backend.put("model", b"x")
    backend.put("dir/model", b"x")
    with pytest.raises(ObjectNotFoundError, match=r"\A[^\n]+\Z") as caught:
        await store.stat(key)
    assert key in str(caught.value) or len(key) > 255 or not key.isascii()
    assert (await store.list_page(f"{key}/")).exists is (key == "dir")


async def test_any_range_is_exact(backend: Backend, store: Store) -> None:
    draw = random.Random(11)
    content = draw.randbytes(100_003)
    backend.put("model", content)
    generation = await store.stat("model")
    last = len(content)

    ranges = [(0, 1), (last - 1, last), (0, last), (1, last), (0, last - 1), (4095, 4097)]
    ranges += [(start, draw.randint(start + 1, last)) for start in (draw.randrange(last) for _ in range(40))]
    for start, stop in ranges:
        assert same(await read(store, generation, start, stop), content[start:stop]), f"bytes {start}-{stop}"


async def test_large_object_is_read_exactly_whole_and_in_pieces(backend: Backend, store: Store) -> None:
    content = random.Random(12).randbytes(17 * MIB + 4321)
    backend.put("model", content)
    generation = await store.stat("model")

    assert same(await read(store, generation, 0, len(content)), content)
    for start in range(0, len(content), 8 * MIB):
        stop = min(start + 8 * MIB, len(content))
        assert same(await read(store, generation, start, stop), content[start:stop])


async def test_pieces_come_from_one_thread_that_may_call_the_event_loop(backend: Backend, store: Store) -> None:
    content = random.Random(16).randbytes(3 * MIB + 5)
    backend.put("model", content)
    received = bytearray()
    threads = set()

    def sink(piece: Buffer) -> None:
        threads.add(threading.get_ident())
        trio.from_thread.run_sync(received.extend, bytes(piece))

    await store.read(await store.stat("model"), 7, len(content) - 7, sink)
    assert same(received, content[7:])
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_error_that_the_sink_raises_comes_back_as_itself(backend: Backend, store: Store) -> None:
    class SinkError(StoreError):
        pass

    def sink(piece: Buffer) -> None:
        raise error

    error = SinkError("the disk is full")
    backend.put("model", bytes(3 * MIB))
    with pytest.raises(SinkError) as caught:
        await store.read(await store.stat("model"), 0, 3 * MIB, sink)
    assert caught.value is error
    # Nothing of the failed read is left in the way of the next.
    assert await read(store, await store.stat("model"), 0, 5) == bytes(5)


@pytest.mark.promise("streaming", on=STREAMING)
async def test_streaming_store_passes_on_no_byte_of_another_generation(
    backend: Backend, store: Store, request: pytest.FixtureRequest
) -> None:
    pieces: list[Buffer] = []
    backend.put("model", b"old" * MIB)
    old = await store.stat("model")
    backend.put("model", b"new" * MIB)
    assert store.streaming == (request.node.callspec.params["backend"] in STREAMING)
    if backend.keeps:
        assert same(await read(store, old), b"old" * MIB)
        return
    with pytest.raises((ObjectChangedError, ObjectNotFoundError)):
        await store.read(old, 0, 3 * MIB, pieces.append)
    assert not (store.streaming and pieces)


async def test_16_tasks_read_one_object_at_once(backend: Backend, store: Store) -> None:
    content = random.Random(13).randbytes(4 * MIB)
    backend.put("model", content)
    generation = await store.stat("model")
    wrong: list[int] = []

    async def check(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(4):
            start = draw.randrange(len(content))
            stop = draw.randint(start + 1, len(content))
            if not same(await read(store, generation, start, stop), content[start:stop]):
                wrong.append(start)

    async with trio.open_nursery() as nursery:
        for seed in range(16):
            nursery.start_soon(check, seed)
    assert wrong == []


# Change


@pytest.mark.promise("generation pinned")
@pytest.mark.parametrize("new", [b"new bytes", b"short", b"rather longer bytes"])
async def test_replaced_object_gives_no_bytes_for_the_old_generation(
    backend: Backend, store: Store, new: bytes
) -> None:
    backend.put("model", b"old bytes")
    (listed,) = (await store.list_page("")).objects
    told = await store.stat("model")
    backend.put("model", new)
    assert (await store.stat("model")).etag != told.etag

    for old in (listed, told):
        await gives_no_other_bytes(backend, store, old, b"old bytes")
    assert await read(store, await store.stat("model"), 0, len(new)) == new


@pytest.mark.parametrize("instead", [None, "model/params"], ids=["nothing", "a directory"])
async def test_deleted_object_gives_no_bytes(backend: Backend, store: Store, instead: str | None) -> None:
    backend.put("model", b"old bytes")
    old = await store.stat("model")
    backend.delete("model")
    if instead is not None:
        backend.put(instead, b"new bytes")

    await gives_no_other_bytes(backend, store, old, b"old bytes")
    with pytest.raises(ObjectNotFoundError):
        await store.stat("model")


@pytest.mark.promise("generation pinned")
async def test_reads_during_replacements_never_mix_contents(backend: Backend, store: Store) -> None:
    contents = [bytes([number]) * (2 * MIB) for number in range(8)]
    backend.put("model", contents[0])
    outcomes: Counter[str] = Counter()
    replaced = trio.Event()

    async def read_on() -> None:
        while outcomes["whole"] < 20 or not replaced.is_set():
            try:
                generation = await store.stat("model")
                got = await read(store, generation, 0, generation.size)
            except (ObjectChangedError, ObjectNotFoundError):
                outcomes["changed"] += 1
            except TransientStoreError:
                outcomes["failed"] += 1  # Ceph: 500 when the object goes while it is being sent
            else:
                outcomes["whole" if got.count(got[:1]) == len(got) == 2 * MIB else "mixed"] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(read_on)
        for content in contents * 3:
            await trio.to_thread.run_sync(backend.put, "model", content)
            await trio.sleep(0.005)
        replaced.set()
    assert outcomes["mixed"] == 0


# Versions, where the store has them


async def test_generation_read_by_its_version_outlives_replacement_and_deletion(s3: S3Backend, s3_store: Store) -> None:
    old, new = (random.Random(seed).randbytes(MIB) for seed in (14, 15))
    replacements: tuple[bytes | None, ...] = (new, None)
    s3.keep_versions()
    s3.put("model", old)
    (listed,) = (await s3_store.list_page("")).objects

    version = await s3_store.read(listed, 0, 10, ignore)
    assert version
    assert version == (await s3_store.stat("model")).version_id
    kept = replace(listed, version_id=version)
    for replacement in replacements:
        if replacement is not None:
            s3.put("model", replacement)
        else:
            s3.delete("model")
        assert same(await read(s3_store, kept, 1000, MIB), old[1000:])
        with pytest.raises((ObjectChangedError, ObjectNotFoundError)):
            await read(s3_store, listed, 1000, MIB)
    with pytest.raises(ObjectNotFoundError):
        await s3_store.stat("model")
    assert names(await s3_store.list_page("")) == []


async def test_version_that_was_removed_gives_no_bytes(s3: S3Backend, s3_store: Store) -> None:
    s3.keep_versions()
    s3.put("model", b"old bytes")
    old = await s3_store.stat("model")
    assert old.version_id is not None
    s3.put("model", b"new bytes")
    s3.client.delete_object(Bucket=s3.bucket, Key="model", VersionId=old.version_id)

    with pytest.raises((ObjectChangedError, ObjectNotFoundError)):
        await read(s3_store, old, 0, 9)


async def test_object_without_a_version_can_be_read_also_when_its_bucket_keeps_some(
    s3: S3Backend, s3_store: Store
) -> None:
    s3.put("model", b"weights")
    generation = await s3_store.stat("model")
    assert generation.version_id is None
    assert await s3_store.read(generation, 0, 7, ignore) is None
    s3.keep_versions()
    assert await read(s3_store, await s3_store.stat("model"), 0, 7) == b"weights"


# Odd keys


async def test_odd_names_are_listed_found_and_read(backend: Backend, store: Store) -> None:
    odd_names = [name for name in ODD_NAMES if backend.holds(name)]
    all_names = [name for name in (*ODD_NAMES, *CONTROLS) if backend.holds(name)]
    for name in all_names:
        backend.put(f"dir/{name}", name.encode())
    for name in odd_names:
        backend.put(f"below/{name}/model", name.encode())

    assert sorted(names(await store.list_page("dir/"))) == sorted(f"dir/{name}" for name in all_names)
    assert sorted(names(await store.list_page("below/"))) == sorted(f"below/{name}/" for name in odd_names)
    for name in odd_names:
        assert names(await store.list_page(f"below/{name}/")) == [f"below/{name}/model"]
    for name in all_names:
        generation = await store.stat(f"dir/{name}")
        assert await read(store, generation, 0, generation.size) == name.encode(), name
    with pytest.raises(ObjectNotFoundError):
        await store.stat("dir/a b")  # as which "a+b" would be found by a client that decodes twice


async def test_keys_that_are_no_paths_are_told_apart(s3: S3Backend, s3_store: Store) -> None:
    keys = ("a/b", "a//b", "a/./b", "a/../b", "/a/b", "a/b/", "..", "b")
    for key in keys:
        s3.put(key, key.encode())

    assert sorted(names(await s3_store.list_page(""))) == ["..", "/", "a/", "b"]
    assert sorted(names(await s3_store.list_page("a/"))) == ["a/../", "a/./", "a//", "a/b", "a/b/"]
    for key in keys:
        generation = await s3_store.stat(key)
        assert await read(s3_store, generation, 0, generation.size) == key.encode(), key


# Retries and fetch processes


class _Failing:
    """A store whose every second request fails in a way that may pass."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._requests = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in {"probe", "list_page", "stat", "digest", "read"}:
            return found

        async def request(*arguments: Any, **options: Any) -> Any:
            self._requests += 1
            if self._requests % 2:
                raise TransientStoreError("busy")
            return await found(*arguments, **options)

        return request


@pytest.mark.promise("retry")
async def test_the_wrapper_tries_again_what_may_pass(backend: Backend) -> None:
    failing: Any = _Failing(backend.open())
    retrying = Retrying(deadline_s=20, on_failure=None)
    store = RetryingStore(failing, retrying)
    backend.put("model", b"weights")

    await store.probe()
    (listed,) = (await store.list_page("")).objects
    assert replace(listed, version_id=None) == replace(await store.stat("model"), version_id=None)
    await store.digest(listed)
    assert await retrying.call("model", lambda: read(store, listed)) == b"weights"
    assert retrying.statistics().failed_attempts == 5
    await store.aclose()


FORKED = """
import os, sys, trio
from trimsfs.options import MountOptions
from trimsfs.stores.open import open_store

store = open_store(MountOptions.model_validate_json(sys.argv[1]), max_requests=2)
assert store.forkable

async def model():
    found = await store.stat("model")
    content = bytearray()
    await store.read(found, 0, found.size, content.extend)
    return content

for _ in range(2):
    pid = os.fork()
    if pid == 0:
        os._exit(trio.run(model) != b"weights")
    assert os.waitpid(pid, 0)[1] == 0
assert trio.run(model) == b"weights"
"""


@pytest.mark.promise("fetch processes")
def test_an_unused_store_reads_in_forked_processes(forkable_backend: Backend) -> None:
    forkable_backend.put("model", b"weights")
    command = [sys.executable, "-c", FORKED, forkable_backend.options().model_dump_json()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
