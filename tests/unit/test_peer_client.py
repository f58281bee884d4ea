"""The asking side of a fleet, over TLS with members that behave as each test has them."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import h11
import pytest
import trio

from tests.support.certificates import Authority
from tests.support.stores import MemoryStore
from trimsfs.checksums import crc32c
from trimsfs.extras.fleet import connection, peer_client
from trimsfs.extras.fleet.certificates import client_context
from trimsfs.extras.fleet.peer_client import PeerClient
from trimsfs.extras.fleet.protocol import CRCS, ChunkRequest, format_crcs, parse_request
from trimsfs.fetch.copier import Extent
from trimsfs.fetch.peers import PeerAnswer, PeerRequest
from trimsfs.fetch.processes.thread_copier import ThreadCopier
from trimsfs.stores.http.receive_loop import PIECE
from trimsfs.types import ChunkRecord

CHUNK = 1 << 16
CONTENT = bytes(range(256)) * (CHUNK // 128)
ADDRESS = "127.0.0.1"

Talk = Callable[[ssl.SSLSocket], object]
"""What a member does with a connection."""


class Asked:
    """One request, as a member gets it, and its answer."""

    def __init__(self, stream: ssl.SSLSocket) -> None:
        self.stream = stream
        parser = h11.Connection(h11.SERVER)
        while (event := parser.next_event()) is h11.NEED_DATA:
            parser.receive_data(stream.recv(1 << 16))
        assert isinstance(event, h11.Request)
        self.method = event.method.decode()
        headers = {name.decode(): value.decode() for name, value in event.headers}
        self.request = parse_request(event.target.decode(), headers)

    def answer(self, status: int = 206, body: bytes | None = None, *, told: Mapping[str, str] | None = None) -> None:
        """Answer with the bytes that it wants, if no others; the headers are those that are *told*, and checksums."""
        headers = dict(told or {})
        wanted = CONTENT[self.request.start : self.request.stop]
        if status == 206:
            body = wanted if body is None else body
            headers.setdefault(CRCS, _crcs(wanted))
        body = b"" if body is None else body
        self.begin(status, len(body), headers, body if self.method == "GET" else b"")

    def begin(
        self,
        status: int = 206,
        length: int = len(CONTENT),
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> None:
        """Answer with a head, and at once some *body*; without *headers*, with checksums of the whole content."""
        headers = {CRCS: _crcs(CONTENT)} if headers is None else headers
        lines = [f"HTTP/1.1 {status} x", f"content-length: {length}", *(f"{k}: {v}" for k, v in headers.items())]
        self.stream.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def _crcs(data: bytes) -> str:
    return format_crcs([crc32c(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)])


class Scene:
    """A fleet's CA, and members that a test makes."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.identity = self.authority.identity(ADDRESS)
        self.connections = 0

    def context(self) -> ssl.SSLContext:
        return client_context(self.authority.certificate, self.identity.certificate, self.identity.key)

    @contextmanager
    def member(self, *talks: Talk) -> Iterator[str]:
        """The address of a member, which has each of its connections do what is next, and the last from then on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.identity.certificate, self.identity.key)
        context.load_verify_locations(self.authority.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        with socket.create_server((ADDRESS, 0)) as listener:
            threading.Thread(target=self._serve, args=(listener, context, list(talks)), daemon=True).start()
            yield f"{ADDRESS}:{listener.getsockname()[1]}"
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)

    def _serve(self, listener: socket.socket, context: ssl.SSLContext, talks: list[Talk]) -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            talk = talks.pop(0) if len(talks) > 1 else talks[0]
            self.connections += 1
            threading.Thread(target=self._talk, args=(plain, context, talk), daemon=True).start()

    def _talk(self, plain: socket.socket, context: ssl.SSLContext, talk: Talk) -> None:
        with suppress(OSError, AssertionError), plain, context.wrap_socket(plain, server_side=True) as stream:
            talk(stream)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_client, "ALIVE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(connection, "JUDGED_AFTER_S", 0.1)
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.5)


class Host:
    """What fetches from members."""

    def __init__(self, scene: Scene, directory: Path) -> None:
        self.client = PeerClient(scene.context(), threads=4)
        self.copier = ThreadCopier(MemoryStore(), threads=4, peers=self.client)
        self.path = directory / "blob"
        self.landed: list[ChunkRecord] = []

    async def fetch(self, member: str, *, patience_s: float = 5.0, size: int = len(CONTENT)) -> PeerAnswer:
        with self.path.open("w+b") as file:
            extent = Extent(0, size, file.fileno(), 0, CHUNK)
            request = _request(member, size, patience_s)
            return await self.copier.fetch_from_peer(request, extent, self.landed.append)

    @property
    def got(self) -> bytes:
        return self.path.read_bytes()


def _request(member: str, size: int = len(CONTENT), patience_s: float = 5.0, *, sends: bool = True) -> PeerRequest:
    asked = ChunkRequest(fleet="f", token="0" * 64, key="a/b", start=0, stop=size)
    return PeerRequest(member=member, target=asked.target, headers=asked.headers, patience_s=patience_s, sends=sends)


@pytest.fixture
def host(scene: Scene, tmp_path: Path) -> Iterator[Host]:
    host = Host(scene, tmp_path)
    yield host
    for idle in host.client._idle.values():
        for unused in idle:
            unused.connection.close()


def once(stream: ssl.SSLSocket) -> None:
    Asked(stream).answer()


def always(stream: ssl.SSLSocket) -> None:
    while True:
        Asked(stream).answer()


def alive(stream: ssl.SSLSocket) -> None:
    """Answers the question whether it is alive, as often as it is asked."""
    while True:
        asked = Asked(stream)
        assert (asked.method, asked.request.cached_only) == ("HEAD", True)
        asked.answer(404)


async def test_chunks_come_over_one_connection(scene: Scene, host: Host) -> None:
    with scene.member(always) as member:
        for _ in range(3):
            host.landed.clear()
            answer = await host.fetch(member)
            assert (answer.outcome, answer.received) == ("ok", len(CONTENT))
            assert host.got == CONTENT
            assert [(record.chunk, record.length) for record in host.landed] == [(0, CHUNK), (1, CHUNK)]
    assert scene.connections == 1


HOLDERS = {"trimsfs-holders": "10.0.0.1:7,10.0.0.2:7"}


@pytest.mark.parametrize(
    ("status", "headers", "outcome"),
    [
        (403, HOLDERS, "refused"),
        (404, HOLDERS, "absent"),
        (409, HOLDERS, "other"),
        (503, HOLDERS, "busy"),
        (502, HOLDERS, "unreachable"),
        (503, HOLDERS | {"retry-after": "30"}, "away"),
    ],
)
async def test_a_status_tells_why_there_are_no_chunks(
    scene: Scene, host: Host, status: int, headers: dict[str, str], outcome: str
) -> None:
    with scene.member(lambda stream: Asked(stream).answer(status, b"<html>", told=headers)) as member:
        answer = await host.fetch(member)
    assert (answer.outcome, answer.holders) == (outcome, ["10.0.0.1:7", "10.0.0.2:7"])
    assert host.landed == []


def _with_crcs(crcs: str, stream: ssl.SSLSocket) -> None:
    Asked(stream).answer(told={CRCS: crcs})


def _long(stream: ssl.SSLSocket) -> None:
    Asked(stream).begin(length=100, headers={CRCS: _crcs(CONTENT[:100])}, body=CONTENT[:100] + b"more")


@pytest.mark.parametrize(
    ("size", "talk"),
    [
        *((len(CONTENT), partial(_with_crcs, crcs)) for crcs in ("", "00000000", "00000000,00000000", "x,y")),
        (len(CONTENT), lambda stream: Asked(stream).answer(200, CONTENT)),  # without a range
        (len(CONTENT), lambda stream: Asked(stream).answer(body=CONTENT[:CHUNK])),  # another range
        (100, _long),
    ],
)
async def test_bytes_that_differ_from_their_checksums_do_not_land(
    scene: Scene, host: Host, size: int, talk: Talk
) -> None:
    with scene.member(talk) as member:
        assert (await host.fetch(member, size=size)).outcome == "damaged"
    assert host.landed == []


async def test_interim_answers_are_passed_over(scene: Scene, host: Host) -> None:
    def hinting(stream: ssl.SSLSocket) -> None:
        asked = Asked(stream)
        stream.sendall(2 * b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        asked.answer()

    with scene.member(hinting) as member:
        assert (await host.fetch(member)).outcome == "ok"


async def test_of_an_answer_that_is_not_http_little_is_told(scene: Scene, host: Host) -> None:
    def other(stream: ssl.SSLSocket) -> None:
        Asked(stream)
        stream.sendall(b"\1" * 16000 + b"\r\n\r\n")

    with scene.member(other) as member:
        answer = await host.fetch(member)
    assert answer.outcome == "unreachable"
    assert len(answer.detail) <= 200


@pytest.mark.parametrize("member", ["a..b:7443", f"{'a' * 64}:7443", f"{ADDRESS}:1"])
async def test_an_address_that_cannot_be_or_that_nobody_listens_at_is_unreachable(host: Host, member: str) -> None:
    assert (await host.fetch(member)).outcome == "unreachable"


async def test_a_member_of_another_fleet_is_unreachable(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    host = Host(Scene(tmp_path / "other"), tmp_path)
    with scene.member(always) as member:
        answer = await host.fetch(member)
    assert (answer.outcome, answer.detail) == (
        "unreachable",
        "this host refuses its certificate: self-signed certificate in certificate chain",
    )
    assert host.landed == []


async def test_a_connection_that_the_member_has_closed_is_opened_again(scene: Scene, host: Host) -> None:
    with scene.member(once, always) as member:
        assert (await host.fetch(member)).outcome == "ok"
        await trio.sleep(0.05)
        assert (await host.fetch(member)).outcome == "ok"
    assert scene.connections == 2


async def test_unused_connections_to_all_members_are_few(
    scene: Scene, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_client, "MOST_IDLE_IN_ALL", 1)
    with scene.member(always) as first, scene.member(always) as second:
        for member in (first, second, second):
            assert (await host.fetch(member)).outcome == "ok"
        assert scene.connections == 2
        assert list(host.client._idle) == [second]
        monkeypatch.setattr(peer_client, "IDLE_S", 0.0)
        host.client._close_oldest()
        assert not host.client._idle


async def test_a_name_that_takes_long_to_be_looked_up_is_unreachable(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(peer_client, "OPEN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(20))
    try:
        with trio.fail_after(5):
            answer = await host.fetch("member.example:1")
    finally:
        ended.set()
    assert (answer.outcome, answer.detail) == ("unreachable", "timed out")


async def test_a_member_that_waits_for_the_store_is_waited_for(
    scene: Scene, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_client, "CHECKED_AFTER_S", 0.1)
    monkeypatch.setattr(peer_client, "ALIVE_TIMEOUT_S", 2)

    def waiting(stream: ssl.SSLSocket) -> None:
        asked = Asked(stream)
        time.sleep(0.6)
        asked.answer()

    with scene.member(waiting, alive) as member:
        answer = await host.fetch(member)
    assert answer.outcome == "ok"
    assert answer.waited_s >= 0.6
    assert answer.body_s < 0.5


async def test_a_connection_that_was_closed_meanwhile_makes_no_member_silent(
    scene: Scene, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_client, "CHECKED_AFTER_S", 0.5)
    monkeypatch.setattr(peer_client, "ALIVE_TIMEOUT_S", 2)

    def twice(stream: ssl.SSLSocket) -> None:
        for pause_s in (0.05, 1.2):
            asked = Asked(stream)
            time.sleep(pause_s)
            asked.answer()

    with scene.member(once, twice, alive) as member:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(host.fetch, member)
        assert (await host.fetch(member)).outcome == "ok"
    assert scene.connections == 3


async def test_a_member_that_answers_nothing_is_silent(
    scene: Scene, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_client, "CHECKED_AFTER_S", 0.1)

    def hanging(stream: ssl.SSLSocket) -> None:
        Asked(stream)
        time.sleep(5)

    with scene.member(hanging) as member:
        began = time.monotonic()
        assert (await host.fetch(member)).outcome == "silent"
        assert time.monotonic() - began < 4


async def test_a_body_that_stops_is_silent(scene: Scene, host: Host) -> None:
    def stopping(stream: ssl.SSLSocket) -> None:
        Asked(stream).begin()
        stream.sendall(CONTENT[: CHUNK + 5])
        time.sleep(5)

    with scene.member(stopping) as member:
        assert (await host.fetch(member)).outcome == "silent"


async def test_a_slow_body_is_given_up_before_its_end(
    scene: Scene, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PIECE", 1 << 12)

    def dripping(stream: ssl.SSLSocket) -> None:
        Asked(stream).begin()
        for start in range(0, len(CONTENT), 1 << 12):
            stream.sendall(CONTENT[start : start + (1 << 12)])
            time.sleep(0.2)

    with scene.member(dripping) as member:
        answer = await host.fetch(member, patience_s=3.0)
    assert answer.outcome == "slow"
    assert 0 < answer.received < len(CONTENT)
    assert answer.body_s < 3.0


@pytest.mark.parametrize(("size", "patience_s", "least_s"), [(2 * CHUNK, 1.0, 1.0), (32 * CHUNK, 4.5, 0.1)])
async def test_a_body_that_drips_ends_with_the_patience_or_before(
    scene: Scene, host: Host, size: int, patience_s: float, least_s: float
) -> None:
    """One of a single piece may take the whole patience."""

    def dripping(stream: ssl.SSLSocket) -> None:
        Asked(stream).begin(length=size, headers={CRCS: format_crcs([0] * (size // CHUNK))})
        for _ in range(100):
            stream.sendall(b"drip")
            time.sleep(0.05)

    with scene.member(dripping) as member:
        answer = await host.fetch(member, patience_s=patience_s, size=size)
    assert (answer.outcome, host.landed) == ("slow", [])
    assert 0 < answer.received < PIECE
    assert least_s < answer.body_s < 4.0


async def test_a_member_can_be_asked_to_fetch(scene: Scene, host: Host) -> None:
    methods: list[str] = []

    def told(stream: ssl.SSLSocket) -> None:
        while True:
            asked = Asked(stream)
            methods.append(asked.method)
            asked.answer(200)

    with scene.member(told) as member:
        for _ in range(2):
            assert (await host.copier.ask_peer(_request(member, sends=False))).outcome == "ok"
    assert methods == ["HEAD", "HEAD"]
    assert scene.connections == 1


async def test_a_body_that_begins_slowly_is_not_given_up_at_once(
    scene: Scene, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PIECE", 1 << 12)
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 5.0)

    def hesitating(stream: ssl.SSLSocket) -> None:
        Asked(stream).begin()
        stream.sendall(CONTENT[: 1 << 12])
        time.sleep(0.55)
        stream.sendall(CONTENT[1 << 12 :])

    with scene.member(hesitating) as member:
        assert (await host.fetch(member, patience_s=8.0)).outcome == "ok"


@pytest.mark.parametrize(("heard", "outcome"), [(True, "ok"), (False, "unreachable")])
async def test_a_member_that_has_answered_of_late_is_connected_to_twice(
    scene: Scene, host: Host, monkeypatch: pytest.MonkeyPatch, heard: bool, outcome: str
) -> None:
    """A full link loses packets."""
    opened, lost = connection.PeerConnection.open, iter([True])

    def losing(member: str, context: ssl.SSLContext) -> connection.PeerConnection:
        if next(lost, False):
            raise connection.PeerUnreachableError("timed out")
        return opened(member, context)

    with scene.member(lambda stream: Asked(stream).answer(told={"connection": "close"})) as member:
        if heard:
            assert (await host.fetch(member)).outcome == "ok"
        monkeypatch.setattr(connection.PeerConnection, "open", losing)
        assert (await host.fetch(member)).outcome == outcome
