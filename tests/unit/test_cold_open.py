"""Opening a file that is not here: who waits for it, how long, and what ends the wait."""

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.parts import content_of, until
from tests.support.served import FakeBacking, Server, Serving, Signal, served
from tests.support.stores import MemoryStore
from trimsfs.errors import ObjectChangedError, StoreAccessError, StoreUnavailableError
from trimsfs.fetch.flights import Urgency
from trimsfs.filesystem.handles import passed_through
from trimsfs.namespace.inodes import ROOT_INODE
from trimsfs.opening.cold_open import PATIENCE_S, TRIAL_S

CHUNKS = 5
MODES = ("wait", "auto")


def down() -> StoreUnavailableError:
    return StoreUnavailableError("the store is down")


@pytest.fixture
def content(chunk_size: int) -> bytes:
    return content_of("a", CHUNKS * chunk_size - 100)


@pytest.fixture
def store(content: bytes) -> MemoryStore:
    return MemoryStore({"a": content, "empty": b""})


@pytest.fixture
def serving(store: MemoryStore, backing: FakeBacking, tmp_path: Path, chunk_size: int) -> Serving:
    """Starts a server that passes opens through; always with the same cache."""
    return partial(served, store, tmp_path / "cache", chunk_size=chunk_size, backing=backing)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """A mode that waits for what comes soon."""
    mode: str = request.param
    return mode


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[Server]:
    """A server whose opens wait."""
    async with serving(cold_open="wait") as server:
        yield server


@pytest.fixture
def clock(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> MockClock:
    """Time that passes while nothing else happens; what threads do, takes none."""
    # It jumps no further than to the next look of a tier at itself.
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.FLUSH_INTERVAL_S", 10.0)
    monkeypatch.setattr("trimsfs.tiers.host.memory_tier.CHECK_INTERVAL_S", 10.0)
    mock_clock.autojump_threshold = 0.05
    return mock_clock


def passed(outcomes: list[object]) -> list[bool]:
    """Of opens that gave a handle: whether it is passed through."""
    assert all(isinstance(outcome, int) for outcome in outcomes), outcomes
    return [passed_through(handle) for handle in outcomes if isinstance(handle, int)]


async def opening(
    server: Server, number: int, outcomes: list[object], signal: Signal | None = None, thread: int = 1
) -> None:
    """Open an inode and note the handle, or the error."""
    signal = signal or Signal()
    try:
        outcomes.append(await server.open_inode(number, interruptible=signal.interruptible, thread=thread))
    except (InterruptedError, StoreAccessError, StoreUnavailableError) as error:
        outcomes.append(type(error))


# Waiting


async def test_an_open_waits_and_is_then_passed_through(serving: Serving, content: bytes, mode: str) -> None:
    async with serving(cold_open=mode) as server:
        handle = await server.open("a")
        assert passed_through(handle)
        assert await server.read(handle) == content
        assert server.filesystem.statistics().cached_opens == 0


async def test_all_who_wait_are_answered_once_the_file_is_here(
    serving: Serving, store: MemoryStore, mode: str, chunk_size: int
) -> None:
    async with serving(cold_open=mode) as server:
        number = await server.number("a")
        gate = store.block(offset=chunk_size)
        outcomes: list[object] = []
        async with trio.open_nursery() as nursery:
            for thread in range(1, 4):
                nursery.start_soon(opening, server, number, outcomes, None, thread)
            await store.arrived(CHUNKS)
            await wait_all_tasks_blocked(0.01)
            assert outcomes == []
            gate.set()
        assert passed(outcomes) == [True] * 3
        assert server.filesystem.statistics().open_handles == 3


async def test_without_a_backing_an_open_waits_and_serves_in_cached_mode(
    serving: Serving, store: MemoryStore, content: bytes, mode: str
) -> None:
    async with serving(cold_open=mode, backing=None) as server:
        handle = await server.open("a")
        assert not passed_through(handle)
        assert sum(store.fetched.values()) == len(content)
        assert await server.read(handle) == content


async def test_pages_of_a_streamed_file_are_dropped_when_they_are_spare_and_at_the_last_close(
    serving: Serving, content: bytes
) -> None:
    async with serving(cold_open="stream") as server:
        number = await server.number("a")
        first, second = [await server.open_inode(number) for _ in range(2)]
        assert await server.read(first) == content
        await server.command("warm-host", "a")
        shared = await server.open("a")
        assert not passed_through(shared)
        assert server.dropped == [number]
        server.release(first)
        server.release(shared)
        assert server.dropped == [number]
        async with server.without_syncs(), server.disk.blobs.using(server.store.generation("a")):
            server.release(second)
        assert server.dropped == [number] * 2
        resident = await server.open("a")
        assert passed_through(resident)
        server.release(resident)
        assert server.dropped == [number] * 2


@pytest.mark.parametrize("passes", [False, True])
async def test_a_close_drops_no_pages_without_a_backing_or_of_a_file_that_is_not_whole(
    serving: Serving, chunk_size: int, content: bytes, backing: FakeBacking, passes: bool
) -> None:
    async with serving(cold_open="stream", prefetch="off", backing=backing if passes else None) as server:
        handle = await server.open("a")
        assert await server.read(handle, 0, chunk_size) == content[:chunk_size]
        if not passes:
            await server.command("warm-host", "a")
        server.release(handle)
        assert server.dropped == []


async def test_an_empty_file_is_opened_at_once(serving: Serving, store: MemoryStore, mode: str) -> None:
    async with serving(cold_open=mode) as server:
        number = await server.number("empty")
        store.block()
        handle = await server.open_inode(number)
        assert not passed_through(handle)
        assert await server.read(handle) == b""
        assert store.count("read") == 0
        assert server.filesystem.statistics().cached_opens == 1


async def test_an_open_beside_one_that_streams_does_not_wait(
    serving: Serving, store: MemoryStore, content: bytes, chunk_size: int
) -> None:
    """It could not be passed through: the kernel has the file open in cached mode."""
    async with serving(cold_open="auto") as server:
        number = await server.number("a")
        gate = store.block(offset=chunk_size)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("trimsfs.opening.cold_open.GUESSED_RATE", 1)
            first = await server.open_inode(number)
        second = await server.open_inode(number)
        assert passed([first, second]) == [False] * 2
        gate.set()
        assert await server.read(second) == content


async def test_an_open_of_a_replaced_file_is_looked_up_in_the_store(serving: Serving, store: MemoryStore) -> None:
    """The kernel looks the name up again only once, however long it would have been believed."""
    async with serving(cold_open="wait", metadata_ttl=1) as server:
        number = await server.number("a")
        store.put("a", b"another content")
        await trio.sleep(1.1)
        assert (await server.find("a", thread=2)).size == len(b"another content")
        store.put("a", b"the newest content")
        with pytest.raises(ObjectChangedError):
            await server.open_inode(number)
        await trio.sleep(0.01)
        assert await server.content("a") == b"the newest content"


async def test_what_an_earlier_server_left_is_checked_and_not_fetched(
    serving: Serving, store: MemoryStore, content: bytes, mode: str
) -> None:
    async with serving(cold_open=mode, backing=FakeBacking()) as server:
        await server.command("warm-disk", "a")
    reads = store.count("read")
    async with serving(cold_open=mode) as server:
        handle = await server.open("a")
        assert passed_through(handle)
        assert await server.read(handle) == content
    assert store.count("read") == reads


# What is known of readers


async def test_auto_streams_a_large_file_of_which_nothing_is_known(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.opening.cold_open.GUESSED_RATE", len(content))
    async with serving(cold_open="auto") as server:
        handle = await server.open("a")
        assert (passed_through(handle), store.count("read")) == (False, 0)
        assert await server.read(handle) == content


async def test_auto_waits_for_a_large_file_that_is_fetched_ahead(
    serving: Serving, store: MemoryStore, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.opening.cold_open.GUESSED_RATE", len(content))
    async with serving(cold_open="auto") as server, server.disk.blobs.using(store.generation("a")) as blob:
        gate = store.block(method="read")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(server.fetcher.fetch_all, blob, Urgency.AHEAD))
            await store.arrived(1)
            outcomes: list[object] = []
            nursery.start_soon(opening, server, await server.number("a"), outcomes)
            await wait_all_tasks_blocked(0.01)
            assert outcomes == []
            gate.set()
        assert passed(outcomes) == [True]


# Signals


@pytest.mark.parametrize("when", ["before", "meanwhile", "after it was resident"])
async def test_a_signal_ends_the_wait_and_leaves_nothing_in_use(
    serving: Serving, store: MemoryStore, content: bytes, mode: str, when: str
) -> None:
    async with serving(cold_open=mode) as server:
        number = await server.number("a")
        if when == "after it was resident":
            await server.command("warm-host", "a")
            assert await server.outcome("evict", "a") == ("done", None)
        store.block(method="read")
        signal, outcomes = Signal(), list[object]()
        if when == "before":
            signal.send()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opening, server, number, outcomes, signal)
            await wait_all_tasks_blocked(0.01)
            signal.send()
        assert outcomes == [InterruptedError]
        store.heal()
        await until(lambda: server.users() == 0)
        assert server.filesystem.statistics().open_handles == 0
        # What nobody waits for is not fetched, but for what had been asked for.
        reads = store.count("read")
        await wait_all_tasks_blocked(0.01)
        assert store.count("read") == reads
        assert await server.content("a") == content


async def test_a_signal_to_one_leaves_others_waiting(server: Server, store: MemoryStore, content: bytes) -> None:
    number = await server.number("a")
    gate = store.block(method="read")
    signal = Signal()
    interrupted: list[object] = []
    patient: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(opening, server, number, interrupted, signal)
        nursery.start_soon(opening, server, number, patient)
        await wait_all_tasks_blocked(0.01)
        signal.send()
        await wait_all_tasks_blocked(0.01)
        assert (interrupted, patient) == ([InterruptedError], [])
        gate.set()
    assert passed(patient) == [True]
    assert sum(store.fetched.values()) == len(content)


# Giving up by the estimate


@pytest.mark.parametrize(
    ("chunks", "delay_s", "waits"),
    [
        pytest.param(5, 0.9 * TRIAL_S, True, id="comes within the trial"),
        pytest.param(5, 5 * TRIAL_S, False, id="nothing comes"),
        pytest.param(18, 0.8 * TRIAL_S, True, id="16 in the first trial"),
        pytest.param(200, 0.8 * TRIAL_S, False, id="takes 6 s"),
    ],
)
async def test_auto_goes_by_the_rate_of_the_file_itself(
    serving: Serving, store: MemoryStore, chunk_size: int, clock: MockClock, chunks: int, delay_s: float, waits: bool
) -> None:
    del clock
    content = content_of("large", chunks * chunk_size)
    store.put("large", content)
    store.delay(delay_s, method="read")
    async with serving(cold_open="auto") as server:
        began = trio.current_time()
        handle = await server.open("large")
        elapsed = trio.current_time() - began
        assert passed_through(handle) == waits
        assert elapsed < PATIENCE_S + TRIAL_S if waits else elapsed == pytest.approx(TRIAL_S, abs=0.05)
        assert await server.read(handle) == content  # the fetch goes on for who has it open now


async def test_auto_waits_longer_for_a_file_that_another_open_waits_for_by_now(
    serving: Serving, store: MemoryStore, chunk_size: int, clock: MockClock
) -> None:
    del clock
    store.put("large", content_of("large", 64 * chunk_size))  # 4 times 16 chunks, 1.6 s
    store.delay(0.8 * TRIAL_S, method="read")
    async with serving(cold_open="auto") as server:
        number, handles = await server.number("large"), list[object]()
        async with trio.open_nursery() as nursery:
            for thread in (1, 2):
                nursery.start_soon(opening, server, number, handles, None, thread)
                await trio.sleep(0.4 * TRIAL_S)
        assert passed(handles) == [True] * 2


async def test_auto_goes_by_what_came_of_late(
    serving: Serving, store: MemoryStore, chunk_size: int, clock: MockClock
) -> None:
    del clock
    for key, chunks in {"first": 32, "small": 2, "large": 500}.items():
        store.put(key, content_of(key, chunks * chunk_size))
    store.delay(0.8 * TRIAL_S, method="read")
    async with serving(cold_open="auto") as server:
        await server.command("warm-disk", "first")
        rate = server.fetcher.statistics().rate
        assert rate is not None
        assert 500 * chunk_size / rate > PATIENCE_S > 2 * chunk_size / rate
        reads, began = store.count("read"), trio.current_time()
        assert not passed_through(await server.open("large"))
        assert trio.current_time() == began
        assert store.count("read") == reads
        assert passed_through(await server.open("small"))


async def test_waiting_waits_however_long_it_takes(serving: Serving, store: MemoryStore, clock: MockClock) -> None:
    del clock
    store.delay(10 * PATIENCE_S, method="read")
    async with serving(cold_open="wait", retry_deadline=1) as server:
        assert passed_through(await server.open("a"))


# Failures


async def test_a_store_that_fails_while_nothing_is_here_fails_the_open(
    serving: Serving, store: MemoryStore, content: bytes, mode: str
) -> None:
    async with serving(cold_open=mode) as server:
        number = await server.number("a")
        for error in (down(), StoreAccessError("denied")):
            store.fail(error, times=float("inf"), method="read")
            with pytest.raises(type(error), match=str(error)):
                await server.open_inode(number)
            store.heal()
            await until(lambda: server.users() == 0)
        assert server.filesystem.statistics().open_handles == 0
        assert await server.content("a") == content


async def test_a_store_that_fails_while_something_is_here_serves_that(
    serving: Serving, store: MemoryStore, content: bytes, mode: str, chunk_size: int
) -> None:
    async with serving(cold_open=mode) as server:
        number = await server.number("a")
        for chunk in range(1, CHUNKS):
            store.fail(down(), times=float("inf"), method="read", offset=chunk * chunk_size)
        # The first chunk came before another failed, or comes with the next.
        outcomes: list[object] = []
        while not outcomes or outcomes[-1] is StoreUnavailableError:
            await opening(server, number, outcomes)
            assert len(outcomes) < 3
        handle = outcomes[-1]
        assert isinstance(handle, int)
        assert not passed_through(handle)
        assert await server.read(handle, 0, chunk_size) == content[:chunk_size]
        with pytest.raises(StoreUnavailableError):
            await server.read(handle, chunk_size, 1)
        store.heal()
        assert await server.read(handle) == content


async def test_an_object_that_was_replaced_fails_the_open_and_is_looked_up_again(
    serving: Serving, store: MemoryStore, mode: str
) -> None:
    async with serving(cold_open=mode) as server:
        number = await server.number("a")
        new = content_of("new", 1000)
        store.put("a", new)
        for _ in range(2):
            with pytest.raises(ObjectChangedError):
                await server.open_inode(number)
        assert server.invalidated == [(ROOT_INODE, b"a")]
        await until(lambda: server.users() == 0)
        assert await server.content("a") == new


async def test_a_file_that_does_not_fit_is_served_as_it_comes(
    serving: Serving, store: MemoryStore, content: bytes, mode: str, chunk_size: int
) -> None:
    async with serving(cold_open=mode, cache_size=2 * chunk_size) as server:
        handle = await server.open("a")
        assert not passed_through(handle)
        assert await server.read(handle) == content
        assert server.backing is not None
        assert server.backing.opened == []


async def test_a_file_that_was_resident_and_does_not_fit_any_more_is_served_as_it_comes(
    serving: Serving, store: MemoryStore, chunk_size: int, content: bytes
) -> None:
    store.put("b", content_of("b", CHUNKS * chunk_size))
    async with serving(cold_open="wait", cache_size=CHUNKS * chunk_size) as server:
        await server.command("warm-host", "a")
        number = await server.number("a")
        assert await server.outcome("evict", "a") == ("done", None)
        keeping = await server.open("b")
        handle = await server.open_inode(number)
        assert not passed_through(handle)
        assert await server.read(handle) == content
        server.release(keeping)
