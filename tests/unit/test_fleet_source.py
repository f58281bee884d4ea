"""Where the hosts of a fleet get chunks from. All is real but for the network between them, which is a function."""

import itertools
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import get_args

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import InLoop, fetcher_of, opened, until
from tests.support.stores import MemoryStore, as_store
from trimsfs.checksums import crc32c
from trimsfs.errors import InvalidRequestError, StoreUnavailableError, TransientStoreError, TrimsError
from trimsfs.extras.fleet import fleet_source, spread
from trimsfs.extras.fleet.fleet_source import FleetSource
from trimsfs.extras.fleet.member_health import Health, RetryBudget
from trimsfs.extras.fleet.members import Members
from trimsfs.extras.fleet.protocol import fleet_token, parse_request
from trimsfs.extras.fleet.spread import Spreader
from trimsfs.fetch import bypass
from trimsfs.fetch.copier import Extent, Landed
from trimsfs.fetch.flights import Flight, Lane, Priority
from trimsfs.fetch.peers import Outcome, PeerAnswer, PeerRequest
from trimsfs.fetch.store_fetcher import StoreFetcher
from trimsfs.listen_address import parse_address
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.types import ChunkRecord

CHUNK = 4096
CHUNKS = 24
SIZE = CHUNK * (CHUNKS - 1) + 100
NAME = "tests"
DEADLINE_S, RETRY_DEADLINE_S = 20.0, 1.0


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_source, "BUSY_PAUSE_S", 0.01)
    monkeypatch.setattr(bypass, "HEAD_BYTES", CHUNK // 2)
    monkeypatch.setattr(bypass, "MOST_BYTES", CHUNK)


class Host(InLoop):
    """A host of a fleet: its cache, its fetcher, and its requests to others."""

    def __init__(self, network: "Network", address: str, tier: DiskTier) -> None:
        super().__init__(as_store(network.store), threads=8)
        self.network = network
        self.address = address
        self.tier = tier
        self.health = Health()
        self.members = Members(",".join(network.addresses), parse_address(address))
        self.members.addresses, self.members.mine = frozenset(network.addresses), frozenset({address})
        self.source = FleetSource(NAME, self.members, self.health, self, tier.space, came=lambda _blob, _size: None)
        self.fetcher: StoreFetcher = fetcher_of(
            network.store,
            tier,
            memory_limit=24 * CHUNK,
            transfer=self,
            peers=self.source,
            deadline_s=network.deadline_s,
        )

    async def spread(self, key: str) -> None:
        """Spread a file over the fleet."""
        await Spreader(self.source, self.tier.blobs, self.fetcher, self).spread(self.network.store.generation(key))

    async def fetch_from_peer(
        self, request: PeerRequest, extent: Extent, landed: Landed, *, priority: Priority | None = None
    ) -> PeerAnswer:
        answer, data = await self.network.ask(request)
        if answer.outcome == "ok":
            os.pwrite(extent.descriptor, data, extent.position)
            landed(ChunkRecord(chunk=extent.start // CHUNK, length=len(data), crc=crc32c(data)))
        return answer

    async def ask_peer(self, request: PeerRequest) -> PeerAnswer:
        return (await self.network.ask(request))[0]

    async def read(self, key: str) -> bytes:
        """All of a file, as a program reads it."""
        async with self.tier.blobs.using(self.network.store.generation(key)) as blob:
            self.fetcher.hold(blob)
            try:
                pieces = [
                    bytes(await self.fetcher.read(blob, start, min(start + CHUNK, blob.generation.size)))
                    for start in range(0, blob.generation.size, CHUNK)
                ]
            finally:
                self.fetcher.unhold(blob)
            return b"".join(pieces)

    async def has(self, key: str) -> set[int]:
        """The chunks of a file that are here."""
        async with self.tier.blobs.using(self.network.store.generation(key)) as blob:
            return {chunk for chunk, state in enumerate(blob.states) if state == ChunkState.VERIFIED}


class Network:
    """Hosts that reach each other, and one store. ``fails`` has members answer as told, ``asked`` counts by outcome.

    What they send waits for the ``gate``; so many are ``waiting``. Each chunk is ``late`` on a member: it is there only
    when it has been asked for so often.
    """

    def __init__(self, count: int, deadline_s: float) -> None:
        self.store = MemoryStore()
        self.deadline_s = deadline_s
        self.addresses = [f"10.0.0.{number}:7443" for number in range(1, count + 1)]
        self.hosts: dict[str, Host] = {}
        self.fails: dict[str, Callable[[], PeerAnswer]] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.gate = trio.Event()
        self.gate.set()
        self.waiting = 0
        self.late = Counter[str]()
        self._arrivals = Counter[tuple[str, int]]()

    def put(self, key: str, size: int = SIZE) -> bytes:
        content = bytes((number * 7 + len(key)) % 251 for number in range(size))
        self.store.put(key, content)
        return content

    @property
    def from_store(self) -> int:
        """Bytes that the store has sent."""
        return sum(request.length for request in self.store.requests if request.method == "read")

    async def ask(self, request: PeerRequest) -> tuple[PeerAnswer, bytes]:
        if request.sends:
            self.waiting += 1
            await self.gate.wait()
            self.waiting -= 1
        if request.member in self.fails:
            answer, data = self.fails[request.member](), b""
        else:
            answer, data = await self._answered(self.hosts[request.member], request)
        self.asked[request.member, answer.outcome] += 1
        return answer, data

    async def _answered(self, host: Host, request: PeerRequest) -> tuple[PeerAnswer, bytes]:
        """What an owner answers."""
        wanted = parse_request(request.target, request.headers)
        generation = self.store.generation(wanted.key)
        if fleet_token(NAME, generation, CHUNK) != wanted.token:
            return PeerAnswer(outcome="other"), b""
        if wanted.instance == host.members.instance:
            return PeerAnswer(outcome="self"), b""
        if not host.source.on:
            return PeerAnswer(outcome="away"), b""
        async with host.tier.blobs.using(generation) as blob:
            chunk = wanted.start // CHUNK
            self._arrivals[host.address, chunk] += 1
            late = self._arrivals[host.address, chunk] <= self.late[host.address]
            chunks = range(chunk, chunk + 1)
            if wanted.cached_only and (late or not request.sends or not await host.fetcher.are_here(blob, chunks)):
                return PeerAnswer(outcome="absent"), b""
            try:
                await host.fetcher.fetch_for_others(blob, chunks)
            except StoreUnavailableError:
                return PeerAnswer(outcome="busy"), b""
            except TrimsError:
                return PeerAnswer(outcome="absent"), b""
            data = bytes(blob.view(wanted.start, wanted.stop)) if request.sends else b""
        return PeerAnswer(outcome="ok", received=len(data), body_s=0.001), data


@asynccontextmanager
async def a_network(
    directory: Path, count: int, *, deadline_s: float = RETRY_DEADLINE_S
) -> AsyncIterator[tuple[Network, list[Host]]]:
    network = Network(count, deadline_s)
    with trio.fail_after(DEADLINE_S):
        async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
            for address in network.addresses:
                tier = await stack.enter_async_context(opened(directory / address, chunk_size=CHUNK))
                network.hosts[address] = Host(network, address, tier)
                await nursery.start(network.hosts[address].fetcher.run)
            yield network, list(network.hosts.values())
            nursery.cancel_scope.cancel()


async def read_together(hosts: list[Host], key: str) -> list[bytes]:
    found: dict[str, bytes] = {}

    async def read(host: Host) -> None:
        found[host.address] = await host.read(key)

    async with trio.open_nursery() as nursery:
        for host in hosts:
            nursery.start_soon(read, host)
    return list(found.values())


@pytest.mark.parametrize("count", [2, 3, 8])
async def test_the_store_sends_each_chunk_once(tmp_path: Path, count: int) -> None:
    async with a_network(tmp_path, count) as (network, hosts):
        content = network.put("m")
        assert await read_together(hosts, "m") == [content] * count
        more = network.from_store - SIZE
        assert 0 <= more <= (count - 1) * CHUNK  # those that a reader waits for first


async def test_a_fleet_of_one_asks_nobody(tmp_path: Path) -> None:
    async with a_network(tmp_path, 1) as (network, [host]):
        content = network.put("m")
        assert await host.read("m") == content
        assert network.asked.total() == 0


async def test_a_host_that_is_off_neither_asks_nor_answers(tmp_path: Path) -> None:
    async with a_network(tmp_path, 3) as (network, hosts):
        content = network.put("m")
        hosts[0].source.on = False
        assert await hosts[0].read("m") == content
        assert network.asked.total() == 0
        assert await hosts[1].read("m") == content
        assert network.asked[hosts[0].address, "ok"] == 0


@pytest.mark.parametrize("outcome", [outcome for outcome in get_args(Outcome) if outcome != "ok"])
async def test_a_member_that_gives_nothing_costs_no_error(
    tmp_path: Path, outcome: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_network(tmp_path, 4) as (network, hosts):
        content = network.put("m")
        network.fails[hosts[0].address] = lambda: PeerAnswer(outcome=outcome)
        assert await read_together(hosts[1:], "m") == [content] * 3
        assert network.from_store < 2.5 * SIZE
    caplog.clear()


async def test_without_any_other_member_all_comes_from_the_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_network(tmp_path, 4) as (network, hosts):
        content = network.put("m")
        for host in hosts[1:]:
            network.fails[host.address] = lambda: PeerAnswer(outcome="unreachable")
        assert await hosts[0].read("m") == content
        assert network.asked.total() <= 3 * 16  # once for each request that was under way
        assert network.from_store <= SIZE + CHUNK
        hosts[0].health.members.clear()
        async with hosts[0].tier.blobs.using(network.store.generation("m")) as blob:
            lanes = Counter(hosts[0].source.lane(blob, chunk) for chunk in range(CHUNKS))
        assert hosts[0].source.counts.store_chunks == lanes[Lane.PEERS] > CHUNKS / 2
    caplog.clear()


async def test_a_late_host_needs_no_store(tmp_path: Path) -> None:
    async with a_network(tmp_path, 4) as (network, hosts):
        content = network.put("m")
        await read_together(hosts[:3], "m")
        network.store.fail(TransientStoreError("away"), method="read")
        assert await hosts[3].read("m") == content


async def test_a_late_host_whose_owners_are_slow_at_first_needs_no_store_either(tmp_path: Path) -> None:
    async with a_network(tmp_path, 3, deadline_s=4) as (network, (host, *others)):
        content = network.put("a")
        for other in others:
            assert await other.read("a") == content
        network.fails = dict.fromkeys(network.addresses, lambda: PeerAnswer(outcome="slow"))
        network.store.fail(TransientStoreError("no route to the store"), times=math.inf, method="read")
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                assert await host.read("a") == content

            nursery.start_soon(read)
            before = network.store.count("read")
            await until(lambda: network.store.count("read") > before)
            network.fails = {}


async def test_a_busy_owner_names_who_has_the_chunk(tmp_path: Path) -> None:
    async with a_network(tmp_path, 3) as (network, hosts):
        content = network.put("m")
        await hosts[0].read("m")
        busy = PeerAnswer(outcome="busy", holders=[hosts[0].address, "192.0.2.1:7443"])
        network.fails[hosts[1].address] = lambda: busy
        before = network.from_store
        hosts[2].members.addresses = frozenset(network.addresses)
        assert await hosts[2].read("m") == content
        assert network.from_store <= before + CHUNK
        assert ("192.0.2.1:7443", "ok") not in network.asked


async def test_hosts_that_wait_for_each_other_all_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.fetch.scheduler.PEER_REQUESTS", 1)
    monkeypatch.setattr("trimsfs.fetch.scheduler.DEMANDED_PEER_REQUESTS", 1)
    turns = itertools.count()
    monkeypatch.setattr(Health, "expected_s", lambda *_: -next(turns))  # the second owner is asked first
    async with a_network(tmp_path, 4) as (network, hosts):
        contents = {f"m{number}": network.put(f"m{number}") for number in range(len(hosts))}
        found: dict[str, bytes] = {}

        async def read(host: Host, key: str) -> None:
            found[key] = await host.read(key)

        async with trio.open_nursery() as nursery:
            for host, key in zip(hosts, contents, strict=True):
                nursery.start_soon(read, host, key)
        assert found == contents


async def test_a_host_that_is_listed_twice_does_not_wait_for_itself(tmp_path: Path) -> None:
    async with a_network(tmp_path, 3) as (network, hosts):
        content = network.put("m")
        other = "192.0.2.9:7443"
        network.hosts[other] = hosts[0]
        hosts[0].members.mine |= {other}
        for host in hosts:
            host.members.addresses |= {other}
        assert await read_together(hosts, "m") == [content] * 3
        assert network.from_store <= SIZE + 2 * CHUNK


async def test_a_host_that_others_list_before_itself_waits_for_nobody_that_waits_for_it(tmp_path: Path) -> None:
    async with a_network(tmp_path, 3) as (network, hosts):
        content = network.put("m")
        hosts[0].members.addresses -= {hosts[0].address}
        assert await read_together(hosts, "m") == [content] * 3
        assert network.from_store <= 1.5 * SIZE


async def test_a_file_is_spread_to_two_owners_of_each_chunk(tmp_path: Path) -> None:
    async with a_network(tmp_path, 4) as (network, hosts):
        network.put("m")
        await hosts[0].spread("m")
        chunks = Counter[int]()
        for host in hosts:
            chunks.update(await host.has("m"))
        assert chunks == dict.fromkeys(range(CHUNKS), 2)
        assert network.from_store == SIZE


@pytest.mark.parametrize(
    ("count", "on", "told"), [(1, True, "no other member"), (2, False, "the fleet is off here: `trimsfs fleet on`")]
)
async def test_a_file_cannot_be_spread_over_one_host(tmp_path: Path, count: int, on: bool, told: str) -> None:
    async with a_network(tmp_path, count) as (network, [host, *_]):
        network.put("m")
        host.source.on = on
        with pytest.raises(InvalidRequestError, match=told):
            await host.spread("m")


async def test_a_spread_that_loses_the_fleet_midway_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "CHUNKS_AT_ONCE", 1)
    async with a_network(tmp_path, 2) as (network, [host, other]):
        network.put("m")

        def answer() -> PeerAnswer:
            host.source.on = False
            return PeerAnswer(outcome="ok")

        network.fails[other.address] = answer
        with pytest.raises(StoreUnavailableError, match=f"{CHUNKS - 1} chunks not spread: .* the fleet is off here"):
            await host.spread("m")


async def test_a_spread_goes_on_when_a_fetch_process_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "PAUSE_S", 0.01)
    async with a_network(tmp_path, 2) as (network, [host, other]):
        network.put("m")
        deaths = iter([TransientStoreError("the fetch process died")] * 2)
        asked = host.ask_peer

        async def ask_peer(request: PeerRequest) -> PeerAnswer:
            for death in deaths:
                raise death
            return await asked(request)

        monkeypatch.setattr(host, "ask_peer", ask_peer)
        await host.spread("m")
        assert await other.has("m") == set(range(CHUNKS))


async def test_the_first_bytes_do_not_wait_for_members(tmp_path: Path) -> None:
    async with a_network(tmp_path, 4) as (network, hosts):
        content = network.put("m")
        network.gate = trio.Event()
        read = 0
        for host in hosts:
            async with host.tier.blobs.using(network.store.generation("m")) as blob:
                if host.source.lane(blob, 0) is Lane.PEERS:
                    assert await host.fetcher.read(blob, 10, 20) == content[10:20]
                    assert host.fetcher.statistics().fetched_chunks == 1
                    read += 1
        assert read == len(hosts) - 1
        network.gate.set()


async def test_lanes_are_those_of_the_owners(tmp_path: Path) -> None:
    async with a_network(tmp_path, 4) as (network, hosts):
        network.put("m")
        lanes: list[list[Lane]] = []
        for host in hosts:
            async with host.tier.blobs.using(network.store.generation("m")) as blob:
                lanes.append([host.source.lane(blob, chunk) for chunk in range(CHUNKS)])
        assert all(list(each).count(Lane.STORE) == 1 for each in zip(*lanes, strict=True))


async def test_the_second_owner_waits_for_a_first_one_that_is_busy(tmp_path: Path) -> None:
    async with a_network(tmp_path, 2) as (network, hosts):
        content = network.put("m")
        busy = Counter[str]()

        def answer() -> PeerAnswer:
            busy["times"] += 1
            if busy["times"] == 2 * CHUNKS:
                del network.fails[hosts[0].address]
            return PeerAnswer(outcome="busy")

        network.fails[hosts[0].address] = answer
        assert await hosts[1].read("m") == content
        assert network.asked[hosts[0].address, "ok"] > 0
        assert network.from_store <= SIZE + CHUNK


async def test_a_chunk_that_is_still_on_the_way_to_who_is_named_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_source, "ARRIVING_S", 0.01)
    async with a_network(tmp_path, 3) as (network, hosts):
        content = network.put("m")
        await hosts[0].read("m")
        sent = network.from_store
        network.fails[hosts[1].address] = lambda: PeerAnswer(outcome="busy", holders=[hosts[0].address])
        network.late[hosts[0].address] = 2
        assert await hosts[2].read("m") == content
        assert network.asked[hosts[0].address, "absent"] > 0
        assert network.from_store - sent < CHUNK


async def test_a_member_that_answers_again_is_asked_for_many_chunks_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the first of them takes long."""
    async with a_network(tmp_path, 2) as (network, hosts):
        content = network.put("m")
        hosts[1].health.answered(hosts[0].address, PeerAnswer(outcome="unreachable"))
        hosts[1].health.of(hosts[0].address).down_until = trio.current_time()
        network.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hosts[1].read, "m")
            await until(lambda: network.waiting > 1)
            network.gate.set()
        assert network.from_store <= SIZE + CHUNK
        assert await hosts[1].read("m") == content
    caplog.clear()


async def test_hosts_share_the_requests_that_one_would_have_under_way(tmp_path: Path) -> None:
    """Their chunks then land one after the other, and go on to other hosts meanwhile."""
    async with a_network(tmp_path, 4) as (network, hosts):
        content = network.put("m", 200 * CHUNK)
        gate = network.store.block(method="read")
        most = hosts[0].fetcher.statistics().request_limit
        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(host.read, "m")
            await wait_all_tasks_blocked(0.05)
            under_way = [request for request in network.store.requests if request.length >= CHUNK]
            assert most / 2 <= len(under_way) <= most + len(hosts)  # a reader's own besides
            gate.set()
        assert await read_together(hosts, "m") == [content] * len(hosts)
        assert network.from_store <= 1.02 * len(content)


async def test_what_hosts_ask_the_store_for_besides_is_a_small_share_of_a_file(tmp_path: Path) -> None:
    async with a_network(tmp_path, 8) as (network, hosts):
        content = network.put("m")
        network.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(host.read, "m")
            await until(lambda: network.waiting >= len(hosts))
            await wait_all_tasks_blocked(0.05)
            network.gate.set()
        assert network.from_store - SIZE <= len(hosts) * CHUNK // 2  # the heads
        assert await hosts[0].read("m") == content


@pytest.mark.parametrize("spreads", [False, True])
async def test_a_host_whose_address_is_translated_does_not_wait_for_itself(tmp_path: Path, spreads: bool) -> None:
    async with a_network(tmp_path, 3) as (network, hosts):
        content = network.put("m")
        hosts[0].members.mine = frozenset({"192.168.0.1:7443"})
        if spreads:
            await hosts[0].spread("m")
            there = [await host.has("m") for host in hosts]
            assert set().union(*there) == set(range(CHUNKS))
        else:
            assert await hosts[0].read("m") == content
            assert network.from_store <= SIZE + 2 * CHUNK
        assert hosts[0].members.mine == {hosts[0].address}


def given_by_others(host: Host, blob: Blob) -> int:
    """A chunk of which others are the owners."""
    return next(chunk for chunk in range(CHUNKS) if not any(map(host.source.is_me, host.source.owners(blob, chunk))))


async def test_while_the_store_is_away_owners_are_asked_once(tmp_path: Path) -> None:
    """No request of this host waits for a turn at a store that gets none."""
    async with a_network(tmp_path, 3) as (network, hosts):
        network.put("m")
        for host in hosts[1:]:
            network.fails[host.address] = lambda: PeerAnswer(outcome="busy")
        async with hosts[0].tier.blobs.using(network.store.generation("m")) as blob:
            chunk, began = given_by_others(hosts[0], blob), trio.current_time()
            for _ in range(2 * int(RetryBudget.MOST)):
                flight = Flight(blob, chunk, demanded=True)
                assert not await hosts[0].source.fetch(flight, deadline=math.inf, away=lambda: True)
        assert trio.current_time() < began + RetryBudget.REFILL_S
        assert network.asked == {(host.address, "busy"): 2 * int(RetryBudget.MOST) for host in hosts[1:]}


async def test_after_the_deadline_each_owner_is_asked_once_all_the_same(tmp_path: Path) -> None:
    async with a_network(tmp_path, 3) as (network, hosts):
        network.put("m")
        async with hosts[0].tier.blobs.using(network.store.generation("m")) as blob:
            chunk = given_by_others(hosts[0], blob)
            first, second = hosts[0].source.owners(blob, chunk)
            network.fails[first] = lambda: PeerAnswer(outcome="busy")
            flight, late = Flight(blob, chunk, demanded=True), trio.current_time()
            assert await hosts[0].source.fetch(flight, deadline=late, away=lambda: False)
    assert network.asked[second, "ok"] == 1


async def test_owners_that_stay_busy_are_asked_until_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_source, "BUSY_PAUSE_S", 0.4)
    async with a_network(tmp_path, 3) as (network, hosts):
        network.put("m")
        for host in hosts[1:]:
            network.fails[host.address] = lambda: PeerAnswer(outcome="busy")
        async with hosts[0].tier.blobs.using(network.store.generation("m")) as blob:
            flight, began = Flight(blob, given_by_others(hosts[0], blob), demanded=True), trio.current_time()
            assert not await hosts[0].source.fetch(flight, deadline=began + 0.1, away=lambda: False)
        assert trio.current_time() < began + 5
        assert network.asked.total() == 2 * len(hosts[1:])  # the last time for what they have


async def test_in_an_outage_for_all_members_reads_fail_soon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first ones wait for owners that wait for the store, then for the store."""
    deadline_s = 3.0
    async with a_network(tmp_path, 4, deadline_s=deadline_s) as (network, hosts):
        network.put("m")
        network.store.fail(TransientStoreError("away"), method="read", times=1_000_000)
        took = list[float]()
        for _ in range(5):
            began = trio.current_time()
            with pytest.raises(StoreUnavailableError):
                await hosts[0].read("m")
            took.append(trio.current_time() - began)
    assert took[0] < 4 * deadline_s
    assert sum(took[1:]) < 3 * deadline_s
    caplog.clear()
