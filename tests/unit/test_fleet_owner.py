"""The serving side of a fleet, as nginx meets it: requests over its Unix socket, and what it lets nginx send."""

import contextlib
import errno
import http.client
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.parts import blob_files, content_of, flip_byte, until
from tests.support.served import Server, Serving, mount_options
from tests.support.stores import MemoryStore
from trimsfs.errors import CacheFullError, StoreAccessError, StoreThrottledError, StoreUnavailableError
from trimsfs.extras.fleet.protocol import ChunkRequest, fleet_token
from trimsfs.extras.fleet.serving.chunk_server import ChunkServer
from trimsfs.options import FLEET_REPORTS, FLEET_SOCKET

FLEET = "testing"
KEY = "model/weights 1"
ASKER = "10.0.0.2:7443"
INSTANCE = "0123456789abcdef"


@pytest.fixture
def store(chunk_size: int) -> MemoryStore:
    return MemoryStore({KEY: content_of(KEY, 3 * chunk_size + 100), "model/config": b"{}"})


class Unix(http.client.HTTPConnection):
    """A connection to a Unix socket, as nginx keeps it."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Asker:
    """Asks a server for chunks of an object."""

    def __init__(self, server: Server, chunks: ChunkServer, cache: Path, chunk_size: int) -> None:
        self.server = server
        self.chunks = chunks
        self.cache = cache
        self.chunk_size = chunk_size
        self.connection = Unix(cache / FLEET_SOCKET)

    def request(self, first: int, last: int, key: str = KEY, **changes: Any) -> ChunkRequest:
        """A request for some chunks."""
        generation = self.server.store.generation(key)
        wanted: dict[str, Any] = {
            "fleet": FLEET,
            "token": fleet_token(FLEET, generation, self.chunk_size),
            "key": key,
            "start": first * self.chunk_size,
            "stop": min(generation.size, (last + 1) * self.chunk_size),
            "asker": ASKER,
        }
        return ChunkRequest(**(wanted | changes))

    async def ask(self, request: ChunkRequest, method: str = "GET") -> tuple[int, dict[str, str]]:
        """Make a request; the status and the headers of the answer."""
        return await trio.to_thread.run_sync(partial(ask, self.connection, request, method))

    def file(self, headers: dict[str, str]) -> Path:
        """The file that nginx is redirected to."""
        place = headers["x-accel-redirect"].partition("?")[0]
        assert place.startswith("/blobs/")
        return self.cache / place[1:]

    def content(self, request: ChunkRequest) -> bytes:
        content: bytes = self.server.store.contents[request.key, self.server.store.generation(request.key).etag]
        return content[request.start : request.stop]

    def report(self, headers: dict[str, str], sent: int) -> None:
        """Report the end of a complete upload as nginx does."""
        number = headers["x-accel-redirect"].partition("?upload=")[2]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports:
            line = f"<190>Nov 28 06:20:00 trimsfs: {number} {sent} OK"
            reports.sendto(line.encode(), str(self.cache / FLEET_REPORTS))


def ask(connection: http.client.HTTPConnection, request: ChunkRequest, method: str) -> tuple[int, dict[str, str]]:
    connection.request(method, request.target, headers=request.headers)
    answer = connection.getresponse()
    assert answer.read() == b""
    return answer.status, dict(answer.headers)


@pytest.fixture
async def asker(serving: Serving, store: MemoryStore, tmp_path: Path, chunk_size: int) -> AsyncIterator[Asker]:
    async with asking(serving, store, tmp_path / "cache", chunk_size) as asker:
        yield asker


@asynccontextmanager
async def asking(
    serving: Serving, store: MemoryStore, cache: Path, chunk_size: int, on: bool = True, **options: Any
) -> AsyncIterator[Asker]:
    """A server with the serving side of a fleet, and what asks it."""
    async with serving() as server, trio.open_nursery() as nursery:
        mount = mount_options(store, cache, chunk_size, fleet=FLEET, **options)
        chunks = ChunkServer(
            mount,
            server.namespace,
            server.disk.blobs,
            server.fetcher,
            directory=cache,
            chunk_size=chunk_size,
            serving=lambda: on,
            instance=INSTANCE,
        )
        await nursery.start(chunks.run)
        asker = Asker(server, chunks, cache, chunk_size)
        with contextlib.closing(asker.connection):
            yield asker
        nursery.cancel_scope.cancel()


async def test_a_host_that_is_off_says_so_whatever_it_is_asked(
    serving: Serving, store: MemoryStore, tmp_path: Path, chunk_size: int
) -> None:
    """`trimsfs doctor` asks for no chunk."""
    async with asking(serving, store, tmp_path / "cache", chunk_size, on=False) as asker:
        for token in (asker.request(0, 1).token, ""):
            status, headers = await asker.ask(asker.request(0, 1, token=token))
            assert (status, headers["retry-after"]) == (503, "10")


async def test_a_server_that_cannot_listen_tells_it(
    serving: Serving, store: MemoryStore, tmp_path: Path, chunk_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    (cache / FLEET_SOCKET).mkdir(parents=True)
    async with asking(serving, store, cache, chunk_size):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports, pytest.raises(ConnectionRefusedError):
            reports.connect(str(cache / FLEET_REPORTS))
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told.startswith(f"fleet: cannot listen in {cache}: ")
    assert told.endswith(": this host sends no chunks: correct that, then `mountctl upgrade`")
    caplog.clear()


async def test_nginx_may_read_what_is_sent_and_nothing_else(asker: Asker, tmp_path: Path) -> None:
    _, headers = await asker.ask(asker.request(0, 0))
    async with asker.server.disk.blobs.using(asker.server.store.generation("model/config")) as other:
        await asker.server.fetcher.fetch_all(other)
        private = asker.server.disk.files.path(other.token)
    shown = asker.file(headers)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (shown, shown.parent, private, tmp_path / "cache")}
    assert modes == {shown: 0o640, shown.parent: 0o750, private: 0o600, tmp_path / "cache": 0o710}


async def test_what_is_not_here_is_not_fetched_for_who_wants_cached_bytes(asker: Asker) -> None:
    cached = asker.request(0, 1, cached_only=True)
    assert (await asker.ask(cached))[0] == 404
    assert blob_files(asker.cache) == []
    assert asker.server.store.reads(KEY) == []
    assert (await asker.ask(asker.request(0, 1)))[0] == 200
    assert (await asker.ask(cached))[0] == 200
    assert (await asker.ask(asker.request(0, 2, cached_only=True)))[0] == 404


async def test_a_head_has_the_chunks_fetched_and_sends_none(asker: Asker) -> None:
    status, headers = await asker.ask(asker.request(0, 3), "HEAD")
    assert status == 200
    assert "x-accel-redirect" not in headers
    assert len(asker.server.store.reads(KEY)) == 4


async def test_another_generation_is_refused_and_a_new_one_noticed(asker: Asker, chunk_size: int) -> None:
    old = asker.request(0, 0)
    assert (await asker.ask(old))[0] == 200
    asker.server.store.put(KEY, content_of("new", 2 * chunk_size))
    await trio.sleep(1.1)  # for so long, an answer of the store counts as recent
    new = asker.request(0, 0)
    status, headers = await asker.ask(new)
    assert status == 200
    assert asker.file(headers).read_bytes()[:chunk_size] == asker.content(new)
    assert (await asker.ask(old))[0] == 409
    assert (await asker.ask(asker.request(0, 0, token="0" * 64)))[0] == 409
    assert (await asker.ask(asker.request(0, 0, key="model/config", token=new.token)))[0] == 409


@pytest.mark.parametrize(
    "changes",
    [
        {"fleet": "another"},
        {"key": "model/../secret"},
        {"key": "/etc/passwd"},
        {"key": ".trims/control"},
        {"start": 1},
        {"stop": 5},
        {"start": 0, "stop": 1 << 40},
    ],
)
async def test_what_no_member_asks_is_refused(asker: Asker, changes: dict[str, Any]) -> None:
    assert (await asker.ask(replace(asker.request(0, 0), **changes)))[0] == 400
    assert asker.server.store.reads() == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoreUnavailableError("away"), 503),
        (StoreThrottledError("slow down"), 503),
        (StoreAccessError("no"), 404),
        (CacheFullError("full"), 404),
        (OSError(errno.EIO, "I/O error"), 404),
    ],
)
async def test_only_an_owner_that_may_soon_have_a_chunk_is_busy(
    asker: Asker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, status: int
) -> None:
    """An asker waits for one that is busy; from another, it goes on at once."""

    async def fetch_for_others(*_: object) -> None:
        raise error

    monkeypatch.setattr(asker.server.fetcher, "fetch_for_others", fetch_for_others)
    assert (await asker.ask(asker.request(0, 0)))[0] == status
    caplog.clear()


async def test_wrong_bytes_of_an_earlier_server_are_never_sent(
    serving: Serving, store: MemoryStore, tmp_path: Path, chunk_size: int
) -> None:
    async with asking(serving, store, tmp_path / "cache", chunk_size) as asker:
        _, headers = await asker.ask(asker.request(0, 3))
        file = asker.file(headers)
    flip_byte(file, chunk_size + 5)
    async with asking(serving, store, tmp_path / "cache", chunk_size) as asker:
        request = asker.request(1, 1)
        reads = len(store.reads(KEY))
        assert (await asker.ask(asker.request(0, 0, cached_only=True)))[0] == 200  # verified
        assert (await asker.ask(replace(request, cached_only=True)))[0] == 404
        assert len(store.reads(KEY)) == reads
        status, headers = await asker.ask(request)
        assert status == 200
        assert file.read_bytes()[request.start : request.stop] == asker.content(request)


async def test_many_who_want_a_chunk_share_one_request_to_the_store(asker: Asker) -> None:
    store, answers = asker.server.store, list[int]()
    gate = store.block()

    async def foreign() -> None:
        connection = Unix(asker.cache / FLEET_SOCKET)
        status, _ = await trio.to_thread.run_sync(partial(ask, connection, asker.request(0, 1), "GET"))
        answers.append(status)
        connection.close()

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(foreign)
        await until(lambda: store.under_way > 0)
        await trio.sleep(0.05)
        gate.set()
    assert answers == [200] * 4
    assert len(store.reads(KEY)) == 2


async def test_an_asker_that_hangs_up_leaves_nothing_waiting(asker: Asker) -> None:
    gate = asker.server.store.block()
    request = asker.request(0, 0)
    connection = Unix(asker.cache / FLEET_SOCKET)
    connection.request("GET", request.target, headers=request.headers)
    await until(lambda: asker.server.store.under_way == 1)
    connection.close()
    await trio.sleep(0.05)
    gate.set()
    assert (await asker.ask(request))[0] == 200  # the flight went on
    assert len(asker.server.store.reads(KEY)) == 1


@pytest.mark.parametrize(("member", "holders"), [("10.0.0.3:7443", ASKER), (ASKER, None)])
async def test_a_chunk_that_many_want_spreads_from_host_to_host_and_sends_none_to_itself(
    asker: Asker, chunk_size: int, monkeypatch: pytest.MonkeyPatch, member: str, holders: str | None
) -> None:
    monkeypatch.setattr("trimsfs.extras.fleet.serving.uploads.PATIENCE_S", 0.2)
    sending = [(await asker.ask(asker.request(0, 0)))[1] for _ in range(4)]
    asker.report(sending[0], chunk_size)
    again = asker.request(0, 0, asker=member)
    assert (await asker.ask(again))[0] == 200
    status, headers = await asker.ask(again)
    assert (status, headers.get("trimsfs-holders")) == (503, holders)


async def test_a_request_that_is_not_http_ends_its_connection_only(asker: Asker) -> None:
    def disturb() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(asker.cache / FLEET_SOCKET))
            client.sendall(b"\x16\x03\x01 no http\r\n\r\n")
            return client.recv(100)

    assert await trio.to_thread.run_sync(disturb) == b""
    assert (await asker.ask(asker.request(0, 0)))[0] == 200


async def test_a_connection_that_is_reset_ends_alone(asker: Asker) -> None:
    gate = asker.server.store.block(offset=asker.chunk_size)

    def request(chunk: int) -> bytes:
        wanted = asker.request(chunk, chunk)
        headers = "".join(f"{name}: {value}\r\n" for name, value in wanted.headers.items())
        return f"GET {wanted.target} HTTP/1.1\r\nhost: a\r\n{headers}\r\n".encode()

    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(asker.cache / FLEET_SOCKET))
        client.sendall(request(0))
        await trio.to_thread.run_sync(client.recv, 1)  # it leaves the rest of the answer unread
        client.sendall(request(1))
        await until(lambda: asker.server.store.under_way == 1)
    await trio.sleep(0.05)
    gate.set()
    assert (await asker.ask(asker.request(0, 0)))[0] == 200


async def test_the_upload_limit_is_passed_on_to_nginx(
    serving: Serving, store: MemoryStore, tmp_path: Path, chunk_size: int
) -> None:
    async with asking(serving, store, tmp_path / "cache", chunk_size, fleet_upload_limit=5 << 20) as asker:
        _, headers = await asker.ask(asker.request(0, 0))
    assert headers["x-accel-limit-rate"] == str(5 << 20)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_request_of_this_very_server_is_not_waited_for(asker: Asker, method: str) -> None:
    assert (await asker.ask(asker.request(0, 0, instance=INSTANCE), method))[0] == 421
    assert asker.server.store.reads(KEY) == []
    assert (await asker.ask(asker.request(0, 0, instance="f" * 16), method))[0] == 200
