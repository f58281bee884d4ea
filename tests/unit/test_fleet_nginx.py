"""The real nginx before a server: what it sends to whom, what it reports, and how it is drained."""

import http.client
import os
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import trio

from mountctl.extras.fleet.nginx import Member, Nginx
from tests.services import HOST, reserved_ports, run_daemon
from tests.support.certificates import Authority, Identity
from tests.support.parts import content_of, until
from tests.support.served import Server, Serving, mount_options
from tests.support.stores import MemoryStore
from trimsfs.errors import CommandNotRunnableError, ConfigurationError
from trimsfs.extras.fleet.protocol import ChunkRequest, fleet_token, format_crcs
from trimsfs.extras.fleet.serving.chunk_server import ChunkServer
from trimsfs.options import MountOptions

TROUBLESHOOTING = Path(__file__).parents[2] / "docs/troubleshooting.md"
FLEET, KEY, MODELS = "testing", "model/weights", Path("/models")


@pytest.fixture
def store(chunk_size: int) -> MemoryStore:
    return MemoryStore({KEY: content_of(KEY, 5 * chunk_size + 7)})


class Fixture:
    """A server of a fleet with its nginx."""

    def __init__(self, server: Server, chunks: ChunkServer, options: MountOptions, nginx: Nginx) -> None:
        self.server = server
        self.chunks = chunks
        self.options = options
        self.nginx = nginx
        self.serving = trio.CancelScope()
        """Ends the chunk server."""

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        with self.serving:
            await self.chunks.run(task_status)

    def configure(self, *, drained: bool = False) -> None:
        self.nginx.write([Member(mountpoint=MODELS, options=self.options, drained=drained)])

    def request(self, first: int, last: int) -> ChunkRequest:
        generation, size = self.server.store.generation(KEY), self.server.disk.chunk_size
        token = fleet_token(FLEET, generation, size)
        stop = min(generation.size, (last + 1) * size)
        return ChunkRequest(fleet=FLEET, token=token, key=KEY, start=first * size, stop=stop)

    def content(self, request: ChunkRequest) -> bytes:
        content = self.server.store.contents[KEY, self.server.store.generation(KEY).etag]
        return content[request.start : request.stop]

    def connection(self, identity: Identity | None) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=self.options.fleet_ca)
        context.check_hostname = False
        if identity is not None:
            context.load_cert_chain(identity.certificate, identity.key)
        host, _, port = str(self.options.fleet_listen).rpartition(":")
        return http.client.HTTPSConnection(host, int(port), context=context, timeout=20)

    @property
    def identity(self) -> Identity:
        assert self.options.fleet_cert is not None
        assert self.options.fleet_key is not None
        return Identity(self.options.fleet_cert, self.options.fleet_key)

    async def get(self, request: ChunkRequest, identity: Identity | None = None, target: str | None = None) -> "Got":
        """Get a chunk over a new connection."""

        def get() -> Got:
            with closing(self.connection(identity or self.identity)) as connection:
                return got(connection, request, target)

        return await trio.to_thread.run_sync(get)

    async def get_whole(self, request: ChunkRequest) -> None:
        assert (await self.get(request)).status == 206


class Got:
    """An answer."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self.body = answer.read()
        self.status = answer.status
        self.headers = answer.headers


def got(connection: http.client.HTTPSConnection, request: ChunkRequest, target: str | None = None) -> Got:
    connection.request("GET", target or request.target, headers=request.headers)
    return Got(connection.getresponse())


def chunk_server(server: Server, options: MountOptions) -> ChunkServer:
    return ChunkServer(
        options,
        server.namespace,
        server.disk.blobs,
        server.fetcher,
        directory=server.disk.directory,
        chunk_size=server.disk.chunk_size,
        serving=lambda: True,
        instance="0" * 16,
    )


@pytest.fixture
async def member(serving: Serving, store: MemoryStore, tmp_path: Path, chunk_size: int) -> AsyncIterator[Fixture]:
    authority = Authority(tmp_path)
    identity = authority.identity(HOST)
    with reserved_ports() as ports:
        port = ports[0]
    async with serving() as server, trio.open_nursery() as nursery:
        options = mount_options(
            store,
            tmp_path / "cache",
            chunk_size,
            fleet=FLEET,
            fleet_listen=f"{HOST}:{port}",
            fleet_ca=authority.certificate,
            fleet_cert=identity.certificate,
            fleet_key=identity.key,
            server_user="root" if os.geteuid() == 0 else None,
        )
        chunks = chunk_server(server, options)
        fixture = Fixture(server, chunks, options, Nginx(tmp_path / "nginx"))
        await nursery.start(fixture.run)
        fixture.configure()
        with run_daemon("nginx", fixture.nginx.command(), tmp_path / "nginx.log", os.environ):
            await until(partial(_listens, fixture))
            yield fixture
        nursery.cancel_scope.cancel()


def _listens(fixture: Fixture) -> bool:
    try:
        with closing(fixture.connection(None)) as connection:
            connection.connect()
    except ConnectionRefusedError:
        return False
    return True


async def test_ranges_come_with_their_checksums(member: Fixture) -> None:
    for first, last in ((0, 0), (1, 3), (5, 5), (0, 5)):
        request = member.request(first, last)
        answer = await member.get(request)
        assert (answer.status, answer.body) == (206, member.content(request))
        async with member.server.disk.blobs.inspecting(member.server.store.generation(KEY)) as blob:
            crcs = [blob.crc(chunk) for chunk in range(first, last + 1)]
        assert answer.headers["trimsfs-crc32c"] == format_crcs(crcs)
    assert len(member.server.store.reads(KEY)) == 6


async def test_only_members_get_anything(member: Fixture, tmp_path: Path) -> None:
    request = member.request(0, 0)
    (tmp_path / "others").mkdir()
    stranger = Authority(tmp_path / "others").identity(HOST)
    assert (await member.get(request, stranger)).status == 403

    def without() -> Got:
        with closing(member.connection(None)) as connection:
            return got(connection, request)

    assert (await trio.to_thread.run_sync(without)).status == 403
    assert member.server.store.reads(KEY) == []


async def test_blobs_are_not_to_be_had_by_their_names(member: Fixture) -> None:
    request = member.request(0, 0)
    assert (await member.get(request)).status == 206
    token = member.server.disk.blobs.token(member.server.store.generation(KEY))
    for target in (f"/blobs/{token[:2]}/{token}", "/blobs/../index.sqlite", f"{request.target}/../../../blobs/", "/"):
        assert (await member.get(request, target=target)).status in {400, 404}


async def test_what_was_sent_is_counted_when_it_was_sent(member: Fixture, chunk_size: int) -> None:
    await member.get(member.request(0, 1))
    await until(lambda: member.chunks.statistics().sent_requests == 1)
    assert member.chunks.statistics().sent_bytes == 2 * chunk_size


@pytest.mark.alone
async def test_nginx_reports_to_the_next_server_too(member: Fixture, tmp_path: Path) -> None:
    told = "send() failed (111: Connection refused) while logging to syslog"
    assert f"`{told}`" in TROUBLESHOOTING.read_text()
    await member.get(member.request(0, 0))
    member.serving.cancel()
    async with trio.open_nursery() as nursery:
        later = chunk_server(member.server, member.options)
        await nursery.start(later.run)
        # The worker that has reported to the old server loses one report, and tells so. Which worker accepts one
        # connection is up to the kernel, so several come at once.
        with trio.fail_after(20):
            while later.statistics().sent_requests == 0 or told not in (tmp_path / "nginx.log").read_text():
                async with trio.open_nursery() as together:
                    for _ in range(8):
                        together.start_soon(member.get_whole, member.request(0, 0))
        nursery.cancel_scope.cancel()


async def test_a_drained_member_finishes_what_it_sends_and_begins_nothing(member: Fixture, chunk_size: int) -> None:
    assert (await member.get(member.request(1, 1))).status == 206
    gate = member.server.store.block()
    under_way = list[Got]()

    async def get() -> None:
        under_way.append(await member.get(member.request(0, 0)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        await until(lambda: member.server.store.under_way == 1)
        member.configure(drained=True)
        assert member.nginx.reload()
        assert (await member.get(member.request(1, 1))).status == 503  # at once: a reload has waited for it
        gate.set()
    assert (under_way[0].status, under_way[0].body) == (206, member.content(member.request(0, 0)))
    member.configure()
    assert member.nginx.reload()
    assert (await member.get(member.request(1, 1))).status == 206


async def test_a_slow_limit_is_kept_by_each_upload(member: Fixture, chunk_size: int) -> None:
    member.chunks._uploads.limit = 2 * chunk_size  # nginx lets go of so much at once, and then each second
    began = time.monotonic()
    answer = await member.get(member.request(0, 4))
    assert answer.status == 206
    assert 0.9 < time.monotonic() - began < 10


async def test_a_configuration_that_nginx_refuses_leaves_the_last_one(member: Fixture, tmp_path: Path) -> None:
    before = member.nginx.configuration.read_text()
    (tmp_path / "junk.pem").write_text("junk")
    broken = member.options.model_copy(update={"fleet_cert": tmp_path / "junk.pem"})
    with pytest.raises(ConfigurationError, match="nginx refuses its configuration: cannot load certificate"):
        member.nginx.write([Member(mountpoint=MODELS, options=broken)])
    assert member.nginx.configuration.read_text() == before
    assert (await member.get(member.request(0, 0))).status == 206


def test_a_command_that_has_stopped_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mountctl.extras.fleet.nginx.TURN_S", 0.2)
    nginx = Nginx(tmp_path)
    told = f"{tmp_path} is locked by `mountctl fleet`, pid {os.getpid()}: run `kill -CONT {os.getpid()}`, or end it"
    with nginx.changing(), pytest.raises(CommandNotRunnableError) as raised, nginx.changing():
        pass
    assert str(raised.value) == told
    with nginx.changing():
        pass
