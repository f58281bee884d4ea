"""Processes that move bytes: real ones, forked by a program of their own (``tests/support/spawner.py``)."""

import contextlib
import errno
import gc
import hashlib
import inspect
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import crc32c
import pytest
import trio
import trio.testing

from tests.support.chunks import SMALL_CHUNK
from tests.support.parts import content_of, piece, until
from tests.support.tmpfs import tmpfs
from trimsfs import errors
from trimsfs.concurrency.channel import Channel
from trimsfs.concurrency.helper_process import HelperProcess
from trimsfs.errors import StoreError, StoreUnavailableError, TransientStoreError, WorkerLostError
from trimsfs.fetch.copier import Extent, LocalBytes
from trimsfs.fetch.flights import Priority
from trimsfs.fetch.processes.worker_pool import LINGER_S, SILENT_S, WorkerPool
from trimsfs.fetch.processes.workers import NICENESS, ForkedSpawner, Role, Spawner
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.tiers.host.page_cache import resident_bytes
from trimsfs.tiers.ranges import chunk_count
from trimsfs.types import ChunkRecord, Generation

ROOT = Path(__file__).parents[2]
WRITE_SIZE = SMALL_CHUNK // 4
CONTENT = content_of("model", 3 * SMALL_CHUNK + 100)
SPAWNERS = [ForkedSpawner]
KINDS = sorted(
    name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.StoreError)
)


@contextmanager
def spawning(root: Path, *, streaming: bool = False) -> Iterator[HelperProcess]:
    """The process that spawns workers on a directory."""
    ours, theirs = socket.socketpair()
    arguments = [str(theirs.fileno()), str(root), str(WRITE_SIZE), str(streaming)]
    with ours, theirs:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.support.spawner", *arguments], cwd=ROOT, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        pid, (descriptor,), _, _ = socket.recv_fds(ours, 16, 1)
        assert program.wait(10) == 0
    with socket.socket(fileno=descriptor) as end:
        yield HelperProcess("spawner", int(pid), end)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    (root / "model").write_bytes(CONTENT)
    return root


@pytest.fixture(scope="module")
def late_spawner(root: Path) -> Iterator[HelperProcess]:
    with spawning(root) as spawner:
        yield spawner


@pytest.fixture(scope="module")
def streaming_spawner(root: Path) -> Iterator[HelperProcess]:
    with spawning(root, streaming=True) as spawner:
        yield spawner


@pytest.fixture
def fresh_spawner(root: Path) -> Iterator[HelperProcess]:
    """For tests that count processes: those of an earlier test may still be ending in a shared spawner."""
    with spawning(root) as spawner:
        yield spawner


@asynccontextmanager
async def working(process: HelperProcess, *, count: int = 2) -> AsyncIterator[WorkerPool]:
    """A pool at work."""
    pool = WorkerPool(ForkedSpawner(process), count=count)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        try:
            yield pool
        finally:
            nursery.cancel_scope.cancel()


@pytest.fixture
async def pool(late_spawner: HelperProcess) -> AsyncIterator[WorkerPool]:
    async with working(late_spawner) as pool:
        yield pool


@pytest.fixture
async def streaming(streaming_spawner: HelperProcess) -> AsyncIterator[WorkerPool]:
    """A pool whose store gives bytes that are right at once."""
    async with working(streaming_spawner) as pool:
        yield pool


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A descriptor of an empty file."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def odd(key: str, size: int = 10 * SMALL_CHUNK) -> Generation:
    """An object that makes something happen."""
    return Generation(key=key, etag="e", size=size, modified_ns=0)


def ignore(_record: ChunkRecord) -> None:
    """Nobody needs to know."""


async def fetch(
    pool: WorkerPool,
    generation: Generation,
    descriptor: int,
    records: list[ChunkRecord] | None = None,
    *,
    priority: Priority | None = None,
) -> str | None:
    landed = ignore if records is None else records.append
    extent = Extent(0, generation.size, descriptor, 0, SMALL_CHUNK)
    return await pool.fetch(generation, extent, landed, priority=priority)


async def process_of(pool: WorkerPool, descriptor: int) -> tuple[int, int]:
    """The process of the worker that does the next job, and its parent."""
    version = await fetch(pool, odd("self"), descriptor)
    assert version is not None
    worker, parent = version.split()
    return int(worker), int(parent)


def ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


# Jobs


@pytest.fixture(params=["late_spawner", "streaming_spawner"])
def spawner(request: pytest.FixtureRequest) -> HelperProcess:
    """One of each kind of store."""
    spawner: HelperProcess = request.getfixturevalue(request.param)
    return spawner


async def niceness_of_new(spawner: Spawner, role: Role) -> int:
    """The niceness of a new worker of a role, which ends with its socket."""
    with spawner.spawn(role) as end:
        end.setblocking(False)
        channel = Channel(end)
        first, second = [(await channel.receive())[0] for _ in range(2)]  # of the spawner and of the worker
        assert {*first, *second} == {"pid", "ready"}
        pid: int = (first | second)["pid"]
        niceness = os.getpriority(os.PRIO_PROCESS, pid)
    await until(lambda: ended(pid))
    return niceness


@pytest.mark.parametrize("kind", SPAWNERS)
async def test_a_spawner_starts_workers_of_each_role_and_tells_its_end(
    fresh_spawner: HelperProcess, kind: Callable[[HelperProcess], Spawner]
) -> None:
    spawner = kind(fresh_spawner)
    assert {role: await niceness_of_new(spawner, role) for role in NICENESS} == NICENESS
    with trio.move_on_after(0.1):
        await spawner.watch()
    os.kill(fresh_spawner.pid, signal.SIGKILL)
    with trio.fail_after(5), pytest.raises(StoreUnavailableError, match="has ended"):
        await spawner.watch()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Broken pipe"):
        spawner.spawn("fetch")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("told", ["sha256", "crc alone", "another crc", "another sha256", "more than there is"])
async def test_a_chunk_is_copied_from_another_file_if_it_is_the_one_that_was_told(
    pool: WorkerPool, root: Path, file: int, told: str
) -> None:
    position, length = SMALL_CHUNK + 7, SMALL_CHUNK
    if told == "more than there is":
        position = len(CONTENT) - length + 1
    data = CONTENT[position : position + length]
    crc, sha256 = crc32c.crc32c(data), hashlib.sha256(data).digest()
    if told == "another crc":
        crc ^= 1
    sha256 = {"crc alone": b"", "another sha256": bytes(32)}.get(told, sha256)
    extent = Extent(2 * SMALL_CHUNK, 2 * SMALL_CHUNK + length, file, 2 * SMALL_CHUNK, SMALL_CHUNK)
    with (root / "model").open("rb") as source:
        copied = await pool.copy(LocalBytes(source.fileno(), position, crc, sha256), extent)
    assert copied is (told in {"sha256", "crc alone"})
    expected = bytes(2 * SMALL_CHUNK) + data if copied else b""
    assert os.pread(file, len(CONTENT), 0) == expected, "nothing is written before all is compared"


async def test_a_copy_into_a_file_that_cannot_be_written_fails(pool: WorkerPool, root: Path) -> None:
    with (root / "model").open("rb") as source:
        of = LocalBytes(source.fileno(), 0, crc32c.crc32c(CONTENT[:SMALL_CHUNK]), b"")
        with pytest.raises(OSError, match="Bad file descriptor"):
            await pool.copy(of, Extent(0, SMALL_CHUNK, source.fileno(), 0, SMALL_CHUNK))


async def test_an_object_is_fetched_exactly(spawner: HelperProcess, root: Path, file: int) -> None:
    generation = await DirectoryStore(root).stat("model")
    records: list[ChunkRecord] = []
    async with working(spawner) as pool:
        await fetch(pool, generation, file, records)
        assert os.pread(file, len(CONTENT) + 1, 0) == CONTENT
        os.truncate(file, 0)
        start, stop = SMALL_CHUNK, 3 * SMALL_CHUNK
        await pool.fetch(generation, Extent(start, stop, file, 7, SMALL_CHUNK), ignore)
        assert os.pread(file, len(CONTENT), 0) == bytes(7) + CONTENT[start:stop]
    assert records == [
        ChunkRecord(chunk=chunk, length=len(piece(CONTENT, chunk)), crc=crc32c.crc32c(piece(CONTENT, chunk)))
        for chunk in range(4)
    ]


async def test_jobs_at_once_are_shared_out_and_all_exact(pool: WorkerPool, root: Path, tmp_path: Path) -> None:
    contents = {f"many{number}": content_of(f"many{number}", 1000 + 3000 * number) for number in range(30)}
    store = DirectoryStore(root)

    async def copy(key: str) -> None:
        descriptor = os.open(tmp_path / key, os.O_RDWR | os.O_CREAT)
        records: list[ChunkRecord] = []
        await fetch(pool, await store.stat(key), descriptor, records)
        os.close(descriptor)
        assert len(records) == chunk_count(len(contents[key]), SMALL_CHUNK)

    for key, content in contents.items():
        (root / key).write_bytes(content)
    async with trio.open_nursery() as nursery:
        for key in contents:
            nursery.start_soon(copy, key)
    for key, content in contents.items():
        assert (tmp_path / key).read_bytes() == content


async def test_a_worker_that_is_busy_is_spared(pool: WorkerPool, file: int) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, pool, odd("hang/0"), file)
        await trio.testing.wait_all_tasks_blocked(0.01)
        processes = {(await process_of(pool, file))[0] for _ in range(10)}
        nursery.cancel_scope.cancel()
    assert len(processes) == 1


async def test_checksums_are_those_of_the_bytes(pool: WorkerPool, file: int) -> None:
    os.pwrite(file, CONTENT, 0)
    draw = random.Random(1)
    for _ in range(20):
        start, stop = sorted(draw.sample(range(len(CONTENT)), 2))
        assert await pool.checksum(file, start, stop) == crc32c.crc32c(CONTENT[start:stop])
    size = len(CONTENT)
    for start, stop in [(0, size + 1), (size - 1, size + 1), (size, size + 1), (size + 5, size + 9)]:
        assert await pool.checksum(file, start, stop) is None


async def test_a_worker_brings_a_file_into_the_page_cache_or_tells_that_it_is_too_short(
    pool: WorkerPool, file: int
) -> None:
    os.pwrite(file, CONTENT, 0)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    await pool.populate(file, 0, len(CONTENT))
    assert resident_bytes(file) in {None, -(-len(CONTENT) // mmap.PAGESIZE) * mmap.PAGESIZE}
    with pytest.raises(OSError, match="No data available"):
        await pool.populate(file, 0, len(CONTENT) + 1)


async def test_any_key_reaches_the_worker(pool: WorkerPool, root: Path, file: int) -> None:
    key = "/".join(["\udcff\N{GRINNING FACE}" * 40] * 10)
    path = root / os.fsencode(key).decode(errors="surrogateescape")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    await fetch(pool, await DirectoryStore(root).stat(key), file)
    assert os.pread(file, len(CONTENT) + 1, 0) == CONTENT


async def test_what_nobody_waits_for_gives_way_until_somebody_does(fresh_spawner: HelperProcess, file: int) -> None:
    async with working(fresh_spawner) as pool:
        ordinary, spawner = await process_of(pool, file)
        priority = Priority(background=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(fetch, pool, odd("hang/0"), file, priority=priority))
            await until(lambda: len(workers(spawner)) == 2)
            (process,) = workers(spawner) - {ordinary}
            await until(lambda: _niceness(process) == {NICENESS["background"]})
            priority.lift()
            await until(lambda: _niceness(process) == {NICENESS["fetch"]})
            assert _niceness(ordinary) == {NICENESS["fetch"]}
            nursery.cancel_scope.cancel()
        await until(lambda: _niceness(process) == {NICENESS["background"]})


async def test_a_job_that_has_ended_lifts_nothing(fresh_spawner: HelperProcess, file: int) -> None:
    async with working(fresh_spawner) as pool:
        priority = Priority(background=True)
        version = await fetch(pool, odd("self"), file, priority=priority)
        assert version is not None
        process = int(version.split()[0])
        priority.lift()
        await trio.sleep(0.3)
        assert _niceness(process) == {NICENESS["background"]}


def _niceness(process: int) -> set[int]:
    """The niceness of each thread."""
    found = set()
    for thread in os.listdir(f"/proc/{process}/task"):
        with suppress(ProcessLookupError):  # it has ended
            found.add(os.getpriority(os.PRIO_PROCESS, int(thread)))
    return found


async def test_digests_are_computed_in_idle_time_by_a_process_that_ends_afterwards(
    fresh_spawner: HelperProcess, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LINGER_S, "digest", 0.3)
    os.pwrite(file, CONTENT, 0)
    expected = hashlib.md5(CONTENT).digest()
    async with working(fresh_spawner, count=1) as pool:
        process, spawner = await process_of(pool, file)
        assert await pool.digest(file, len(CONTENT), "md5", 0) == expected
        assert workers(spawner) == {process}
        assert await pool.digest(file, len(CONTENT), "md5", 0, idle=True) == expected
        (idle,) = workers(spawner) - {process}
        assert (os.sched_getscheduler(idle), os.getpriority(os.PRIO_PROCESS, idle)) == (os.SCHED_IDLE, 19)
        assert os.sched_getscheduler(process) == os.SCHED_OTHER
        assert await pool.digest(file, len(CONTENT) + 1, "md5", 0, idle=True) is None
        assert workers(spawner) == {process, idle}
        await until(lambda: workers(spawner) == {process})
        assert await pool.digest(file, len(CONTENT), "md5", 0, idle=True) == expected
        (another,) = workers(spawner) - {process}
    await until(lambda: ended(another))


async def test_fetch_processes_start_when_they_are_needed_and_end_when_they_are_not(
    fresh_spawner: HelperProcess, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LINGER_S, "fetch", 0.3)
    async with working(fresh_spawner) as pool:
        assert not pool._workers["fetch"]
        process, spawner = await process_of(pool, file)
        for _ in range(3):
            assert (await process_of(pool, file))[0] == process
        assert workers(spawner) == {process}  # one suffices for jobs that follow each other
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fetch, pool, odd("hang/0"), file)
            await until(lambda: len(workers(spawner)) == 2)
            await trio.sleep(0.6)  # that of a job that takes long stays
            assert len(workers(spawner)) == 2
            nursery.cancel_scope.cancel()
        await until(lambda: not workers(spawner))
        assert (await process_of(pool, file))[0] != process
        assert pool.died == 0


async def test_a_digest_whose_process_dies_is_tried_again_in_another(fresh_spawner: HelperProcess, file: int) -> None:
    os.pwrite(file, CONTENT, 0)
    async with working(fresh_spawner, count=1) as pool:
        process, spawner = await process_of(pool, file)
        assert await pool.digest(file, len(CONTENT), "md5", 0, idle=True)
        (idle,) = workers(spawner) - {process}
        os.kill(idle, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lost_digest, pool, file)
            await trio.testing.wait_all_tasks_blocked(0.05)
            os.kill(idle, signal.SIGKILL)
        assert await pool.digest(file, len(CONTENT), "md5", 0, idle=True) == hashlib.md5(CONTENT).digest()
        assert pool.died == 1


async def lost_digest(pool: WorkerPool, descriptor: int) -> None:
    with pytest.raises(TransientStoreError, match="the fetch process died"):
        await pool.digest(descriptor, len(CONTENT), "md5", 0, idle=True)


def workers(spawner: int) -> set[int]:
    """The processes that a spawner has forked and that have not ended."""
    children = map(int, Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split())
    return {child for child in children if not ended(child)}


async def test_chunks_of_a_stream_and_bytes_before_their_chunk_is_whole_are_told_of_while_it_goes_on(
    streaming: WorkerPool, file: int
) -> None:
    heard: list[int] = []
    records: list[ChunkRecord] = []
    generation = odd(f"hang/{2 * SMALL_CHUNK + 2 * WRITE_SIZE}")
    async with trio.open_nursery() as nursery:
        extent = Extent(0, generation.size, file, 0, SMALL_CHUNK)
        nursery.start_soon(partial(streaming.fetch, generation, extent, records.append, heard.append, eager=True))
        await until(lambda: len(records) == 2 and max(heard, default=0) > 2 * SMALL_CHUNK)
        nursery.cancel_scope.cancel()
    assert [record.chunk for record in records] == [0, 1]
    assert heard == sorted(set(heard))
    assert max(heard) <= 2 * SMALL_CHUNK + 2 * WRITE_SIZE


# Errors


@pytest.mark.parametrize("kind", KINDS)
async def test_errors_of_the_store_come_back_as_themselves(pool: WorkerPool, file: int, kind: str) -> None:
    text = "bucket b: a key \N{GRINNING FACE} \udcff: denied"
    with pytest.raises(StoreError) as caught:
        await fetch(pool, odd(f"error/{kind}/{text}"), file)
    assert type(caught.value) is getattr(errors, kind)
    assert str(caught.value) == text
    assert pool.died == 0


async def test_errors_of_the_file_come_back_as_themselves(pool: WorkerPool, root: Path, tmp_path: Path) -> None:
    generation = await DirectoryStore(root).stat("model")
    with tmpfs(tmp_path / "disk", 4096) as directory:
        descriptor = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
        with pytest.raises(OSError, match="No space left on device") as caught:
            await fetch(pool, generation, descriptor)
        assert caught.value.errno == errno.ENOSPC
        os.close(descriptor)
    writable = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(writable, CONTENT)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await pool.checksum(writable, 0, 10)
    with pytest.raises(OSError, match="Permission denied"):
        await pool.populate(writable, 0, 10)
    os.close(writable)


async def test_a_defect_ends_the_job_and_not_the_worker(pool: WorkerPool, file: int) -> None:
    with pytest.raises(StoreUnavailableError, match=r"internal error: ZeroDivisionError\('oops'\)"):
        await fetch(pool, odd("error/defect/oops"), file)
    assert await fetch(pool, odd("self"), file)
    assert pool.died == 0


# Workers that end


async def lose(pool: WorkerPool, generation: Generation, descriptor: int, records: list[ChunkRecord]) -> None:
    """Do a job that is lost with its worker."""
    with pytest.raises(TransientStoreError, match="the fetch process died"):
        await fetch(pool, generation, descriptor, records)


async def test_a_worker_that_is_killed_fails_its_jobs_and_is_replaced(
    streaming_spawner: HelperProcess, root: Path, file: int
) -> None:
    async with working(streaming_spawner, count=1) as pool:
        process, _ = await process_of(pool, file)
        records: list[ChunkRecord] = []
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for count in (SMALL_CHUNK, 0, 0):
                    nursery.start_soon(lose, pool, odd(f"hang/{count}"), file, records)
                await until(lambda: bool(records))
                os.kill(process, signal.SIGKILL)
        # What had landed before has landed.
        assert [record.chunk for record in records] == [0]
        assert pool.died == 1
        with trio.fail_after(5):
            await fetch(pool, await DirectoryStore(root).stat("model"), file)
            assert (await process_of(pool, file))[0] != process
        assert os.pread(file, len(CONTENT), 0) == CONTENT


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch processes that do not answer are given up soon."""
    monkeypatch.setattr("trimsfs.fetch.processes.worker_pool.LOOK_INTERVAL_S", 0.1)
    monkeypatch.setitem(SILENT_S, "fetch", 0.5)


@pytest.mark.usefixtures("impatient")
async def test_a_worker_that_is_stopped_is_killed_and_fails_its_jobs(
    streaming_spawner: HelperProcess, root: Path, file: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(streaming_spawner, count=1) as pool:
        process, _ = await process_of(pool, file)
        os.kill(process, signal.SIGSTOP)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(1000):  # more than the socket takes: some are still to be sent
                    nursery.start_soon(silent, pool, file)
        await until(lambda: ended(process))
        assert f"fetch process {process} does not answer" in caplog.text
        assert pool.died == 1
        with trio.fail_after(5):
            await fetch(pool, await DirectoryStore(root).stat("model"), file)
        assert os.pread(file, len(CONTENT), 0) == CONTENT


async def silent(pool: WorkerPool, descriptor: int) -> None:
    with pytest.raises(WorkerLostError, match="the fetch process did not answer"):
        await fetch(pool, odd("hang/0"), descriptor)


@pytest.mark.usefixtures("impatient")
async def test_a_worker_that_is_stopped_is_killed_though_nobody_waits_for_its_job(
    streaming_spawner: HelperProcess, file: int
) -> None:
    """Once it wakes up, it would write what the store has by then."""
    async with working(streaming_spawner, count=1) as pool:
        process, _ = await process_of(pool, file)
        with trio.move_on_after(0.2):
            await fetch(pool, odd("hang/0"), file)
        assert not pool._workers["fetch"][0].jobs
        await until(lambda: not pool._workers["fetch"][0].cancelled)  # it has told that it has ended
        with trio.move_on_after(0.2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch, pool, odd("hang/0"), file)
                await trio.sleep(0.1)
                os.kill(process, signal.SIGSTOP)
        await until(lambda: ended(process))
        assert pool.died == 1


@pytest.mark.usefixtures("impatient")
async def test_a_worker_with_a_job_that_takes_long_is_left_alone(
    streaming_spawner: HelperProcess, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SILENT_S, "fetch", 3)
    async with working(streaming_spawner, count=1) as pool:
        process, _ = await process_of(pool, file)
        with trio.move_on_after(5):
            await fetch(pool, odd("hang/0"), file)
        assert (await process_of(pool, file))[0] == process
        assert pool.died == 0


@pytest.mark.usefixtures("impatient")
async def test_a_spawner_that_is_stopped_ends_the_server(fresh_spawner: HelperProcess, file: int) -> None:
    async with working(fresh_spawner, count=1) as pool:
        process, spawner = await process_of(pool, file)
        os.kill(process, signal.SIGKILL)
        await until(lambda: not workers(spawner))
    os.kill(spawner, signal.SIGSTOP)
    try:
        with trio.fail_after(10), pytest.RaisesGroup(StoreUnavailableError, flatten_subgroups=True):
            async with working(fresh_spawner, count=1) as pool:
                while True:
                    with contextlib.suppress(WorkerLostError):
                        await fetch(pool, odd("hang/0"), file)
                    await trio.sleep(0.01)
    finally:
        os.kill(spawner, signal.SIGCONT)


@pytest.mark.usefixtures("impatient")
async def test_a_spawner_that_hangs_ends_the_server_though_processes_are_ordered_in_turn(
    fresh_spawner: HelperProcess, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a process is in no state that tells it."""

    async def watch(_: HelperProcess) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(HelperProcess, "watch", watch)
    spawner = fresh_spawner.pid
    os.kill(spawner, signal.SIGSTOP)

    async def ordering(pool: WorkerPool, after_s: float) -> None:
        await trio.sleep(after_s)
        while True:
            with contextlib.suppress(WorkerLostError):
                await fetch(pool, odd("hang/0"), file)
            await trio.sleep(0.01)

    try:
        with trio.fail_after(10), pytest.RaisesGroup(StoreUnavailableError, flatten_subgroups=True):
            async with working(fresh_spawner, count=2) as pool, trio.open_nursery() as nursery:
                nursery.start_soon(ordering, pool, 0)
                nursery.start_soon(ordering, pool, 0.3)
    finally:
        os.kill(spawner, signal.SIGCONT)


async def test_jobs_of_other_workers_go_on(late_spawner: HelperProcess, root: Path, tmp_path: Path, file: int) -> None:
    generation = await DirectoryStore(root).stat("model")
    lost = served = 0

    async def work(pool: WorkerPool, number: int) -> None:
        nonlocal lost, served
        descriptor = os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT)
        for _ in range(20):
            os.ftruncate(descriptor, 0)
            try:
                await fetch(pool, generation, descriptor)
            except TransientStoreError:
                lost += 1
            else:
                served += 1
                assert os.pread(descriptor, len(CONTENT) + 1, 0) == CONTENT
        os.close(descriptor)

    async with working(late_spawner, count=3) as pool:
        process, _ = await process_of(pool, file)
        async with trio.open_nursery() as nursery:
            for number in range(9):
                nursery.start_soon(work, pool, number)
            await until(lambda: served > 20)
            os.kill(process, signal.SIGKILL)
        assert pool.died == 1
    # Those that it was doing, and perhaps some that came before it was known to be dead.
    assert lost <= 9
    assert served == 180 - lost


async def test_jobs_that_cannot_be_cancelled_end_with_the_pool(late_spawner: HelperProcess, file: int) -> None:
    outcomes: list[str] = []

    async def shielded(pool: WorkerPool) -> None:
        with trio.CancelScope(shield=True):
            try:
                await fetch(pool, odd("hang/0"), file)
            except errors.TransientStoreError as error:
                outcomes.append(str(error))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery, working(late_spawner) as pool:
            nursery.start_soon(shielded, pool)
            await trio.testing.wait_all_tasks_blocked(0.1)
        with pytest.raises(errors.TransientStoreError):
            await fetch(pool, odd("hang/0"), file)
    assert outcomes == ["the fetch process died"]


async def test_a_worker_that_cannot_be_replaced_ends_nothing(
    late_spawner: HelperProcess, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(late_spawner, count=1) as pool:
        pid = (await process_of(pool, file))[0]
        with monkeypatch.context() as failing:

            def refuse(*_: object) -> socket.socket:
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

            failing.setattr(ForkedSpawner, "spawn", refuse)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pool.died == 1)
            for _ in range(2):
                with pytest.raises(errors.TransientStoreError):
                    await fetch(pool, odd("hang/0"), file)
        assert (await process_of(pool, file))[0] != pid


async def test_a_job_that_nobody_waits_for_any_more_harms_no_other(pool: WorkerPool, file: int) -> None:
    for count in (0, 0, 0, 0, SMALL_CHUNK):
        with trio.move_on_after(0.01):
            await fetch(pool, odd(f"hang/{count}"), file)
    assert all(not worker.jobs for worker in pool._workers["fetch"])
    for _ in range(50):
        with trio.move_on_after(0) as scope:
            await pool.checksum(file, 0, 1)
        assert scope.cancelled_caught
    assert await fetch(pool, odd("self"), file)
    assert pool.died == 0


@pytest.mark.parametrize("busy", [False, True])
async def test_workers_end_with_the_server(late_spawner: HelperProcess, file: int, busy: bool) -> None:
    pool = WorkerPool(ForkedSpawner(late_spawner), count=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        process, _ = await process_of(pool, file)
        if busy:  # a thread of it waits for a store for long
            nursery.start_soon(fetch, pool, odd("hang/0"), file)
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert not ended(process)
        nursery.cancel_scope.cancel()
    await until(lambda: ended(process))


async def test_the_spawner_ends_with_the_server_and_its_workers_do_what_is_left(root: Path, file: int) -> None:
    with spawning(root) as spawner:
        async with working(spawner, count=1) as pool:
            process, parent = await process_of(pool, file)
            spawner.socket.close()
            await until(lambda: ended(parent))
            assert (await process_of(pool, file))[0] == process
        await until(lambda: ended(process))


async def test_jobs_leave_no_descriptor_open(pool: WorkerPool, root: Path, file: int) -> None:
    generation = await DirectoryStore(root).stat("model")

    async def jobs(count: int) -> None:
        for number in range(count):
            await fetch(pool, generation, file)
            await pool.checksum(file, 0, 100)
            for failing in ("error/StoreAccessError/no", "error/defect/oops"):
                with pytest.raises(StoreError):
                    await fetch(pool, odd(failing), file)
            with trio.move_on_after(0.001 * (number % 3)):
                await fetch(pool, generation, file)

    async def descriptors() -> list[int]:
        processes: set[int] = set()
        async with trio.open_nursery() as nursery:  # two at once are done by two workers
            for _ in range(8):
                nursery.start_soon(add, processes)
        assert len(processes) == 2
        return [len(os.listdir(f"/proc/{process}/fd")) for process in ("self", *sorted(processes))]

    async def add(processes: set[int]) -> None:
        processes.add((await process_of(pool, file))[0])

    await jobs(5)
    before = await descriptors()
    await jobs(40)
    after = await descriptors()
    assert all(now <= then + 1 for now, then in zip(after, before, strict=True))


async def test_a_fetch_process_learns_whether_its_helpers_have_failed(pool: WorkerPool, file: int) -> None:
    """Helpers for credentials tell it by their exit status."""
    assert await fetch(pool, odd("helper/3"), file) == "3"
