"""Bodies of answers over real connections, with TLS and without: from the socket to the sink."""

import gzip
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any

import pytest
import urllib3

from tests.support.certificates import Authority
from tests.support.endpoint import Answer, Endpoint, head, reset, truncated, whole
from trimsfs.errors import StoreStalledError, StoreUnavailableError, TransientStoreError
from trimsfs.stores.base import Sink
from trimsfs.stores.http import failures, receive_loop
from trimsfs.stores.http.receive_loop import PIECE, RECORD, HttpBody, RoomySink, receive
from trimsfs.stores.s3.s3_errors import translated
from trimsfs.types import Buffer

MIB = 1 << 20
CONTENT = random.Random(37).randbytes(MIB + 12345)
STALL_S = 0.3

Make = Callable[[Answer], Endpoint]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(params=["http", "https"])
def endpoint(request: pytest.FixtureRequest, authority: Authority) -> Make:
    """Makes a server of plain connections, or of TLS."""
    return lambda answer: Endpoint(answer, authority=authority if request.param == "https" else None)


class Unhurried:
    """Bears any pace."""

    def check(self, done: int) -> None:
        self.done = done


def get(pool: urllib3.HTTPConnectionPool, *, decode: bool = False) -> HttpBody:
    """The body of an answer, of which nothing has been read."""
    return HttpBody(pool.request("GET", "/", preload_content=False, decode_content=decode))


def received(pool: urllib3.HTTPConnectionPool, length: int) -> bytes:
    """The first bytes of a body, which is closed then."""
    came = bytearray()
    with closing(get(pool)) as body:
        receive(body, length, came.extend, Unhurried())
    return bytes(came)


class Rooms:
    """A sink with rooms of its own, of these sizes in turn: `RoomySink`."""

    def __init__(self, *sizes: int) -> None:
        self._sizes = sizes
        self._room = memoryview(b"")
        self.counts: list[int] = []
        self.content = b""

    def room(self) -> memoryview:
        self._room = memoryview(bytearray(self._sizes[len(self.counts) % len(self._sizes)]))
        return self._room

    def filled(self, count: int, *, waits: bool = False) -> None:
        del waits
        self.counts.append(count)
        self.content += self._room[:count]

    def __call__(self, _piece: Buffer) -> None:
        raise AssertionError("the bytes were copied")


# Whole bodies


@pytest.mark.parametrize("size", [1, 5000, 8192, 8193, 100_000, len(CONTENT)])
def test_a_body_comes_whole_and_the_next_request_has_its_connection(endpoint: Make, size: int) -> None:
    server = endpoint(whole(CONTENT[:size]))
    with server.running() as pool:
        for _ in range(3):
            assert received(pool, size) == CONTENT[:size]
    assert server.connections == 1


def test_a_body_that_comes_byte_by_byte_is_whole(endpoint: Make) -> None:
    def drip(client: socket.socket) -> None:
        client.sendall(head({"Content-Length": 300}))
        for position in range(300):
            client.sendall(CONTENT[position : position + 1])

    server = endpoint(drip)
    with server.running() as pool:
        for _ in range(2):
            assert received(pool, 300) == CONTENT[:300]
    assert server.connections == 1


@pytest.mark.parametrize("rooms", [(1,), (100, 7000), (8191,), (50_000, 10), (MIB,)], ids=str)
def test_bytes_go_right_into_the_rooms_of_a_sink(endpoint: Make, rooms: tuple[int, ...]) -> None:
    size = 2000 if rooms == (1,) else 200_000
    server = endpoint(whole(CONTENT[:size]))
    sink = Rooms(*rooms)
    assert isinstance(sink, RoomySink)
    with server.running() as pool:
        for _ in range(2):
            sink = Rooms(*rooms)
            with closing(get(pool)) as body:
                receive(body, size, sink, Unhurried())
            assert sink.content == CONTENT[:size]
            assert max(sink.counts) <= max(rooms)
    assert server.connections == 1


def test_fast_bytes_are_passed_on_in_pieces_and_not_in_records(endpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if they were always there: the threads of this process wait for each other.
    monkeypatch.setattr(receive_loop, "WAITED_S", 60.0)
    monkeypatch.setattr(receive_loop, "is_readable", lambda _: True)
    content = CONTENT[:MIB] * 8
    sizes: list[int] = []
    with endpoint(whole(content)).running() as pool, closing(get(pool)) as body:
        receive(body, len(content), lambda piece: sizes.append(len(piece)), Unhurried())
    assert sizes == [PIECE] * (len(content) // PIECE)


@pytest.mark.parametrize(
    ("come", "pause_s"),
    [
        pytest.param(1, 0, id="one with the head"),
        pytest.param(1000, 0, id="few with the head"),
        pytest.param(100_000, 0, id="many with the head"),
        pytest.param(300_001, 0, id="more than a piece with the head"),
        pytest.param(1, 0.05, id="one"),
        pytest.param(1000, 0.05, id="few"),
        pytest.param(100_000, 0.05, id="many"),
        pytest.param(300_001, 0.05, id="more than a piece"),
        pytest.param(4 * RECORD, 0.05, id="whole records"),
        pytest.param(10 * RECORD, 0.05, id="more whole records"),
    ],
)
def test_bytes_before_a_pause_are_passed_on_before_the_rest_comes(endpoint: Make, come: int, pause_s: float) -> None:
    passed_on = threading.Event()

    def slowly(client: socket.socket) -> None:
        first = head({"Content-Length": len(CONTENT)})
        if pause_s:
            client.sendall(first)
            time.sleep(pause_s)
            first = b""
        client.sendall(first + CONTENT[:come])
        passed_on.wait(10)
        client.sendall(CONTENT[come:])

    came = bytearray()
    sink = read_until(passed_on, come, came)
    with endpoint(slowly).running(timeout_s=5) as pool, closing(get(pool)) as body:
        receive(body, len(CONTENT), sink, Unhurried())
    assert came == CONTENT


def read_until(event: threading.Event, count: int, came: bytearray) -> Sink:
    """A sink that tells when so many bytes have come."""

    def sink(piece: Buffer) -> None:
        came.extend(piece)
        if len(came) >= count:
            event.set()

    return sink


# What is here already


class NoBody:
    """A body that nobody should read."""

    def readinto1(self, _buffer: memoryview, /) -> int:
        raise AssertionError

    most = PIECE

    def ready(self) -> bool:
        raise AssertionError

    def close(self) -> None: ...


def test_bytes_that_are_here_already_fill_one_room_after_the_other() -> None:
    sink = Rooms(100)
    receive(NoBody(), 250, sink, Unhurried(), begin=CONTENT[:250])
    assert (sink.content, sink.counts) == (CONTENT[:250], [100, 100, 50])


def test_bytes_that_are_here_already_are_passed_on_in_pieces() -> None:
    sizes: list[int] = []
    size = 2 * PIECE + 77
    receive(NoBody(), size, lambda piece: sizes.append(len(piece)), Unhurried(), begin=CONTENT[:size])
    assert sizes == [PIECE, PIECE, 77]


def test_a_body_goes_on_behind_the_bytes_that_are_here_already(endpoint: Make) -> None:
    with endpoint(whole(CONTENT[1000:50_000])).running() as pool:
        for sink in (Rooms(300), Rooms(30_000)):
            with closing(get(pool)) as body:
                receive(body, 50_000, sink, Unhurried(), begin=memoryview(CONTENT)[:1000])
            assert sink.content == CONTENT[:50_000]


# Connections that must not be used again


@pytest.mark.parametrize("read", [1, 8192, 500_000])
def test_a_body_that_is_longer_than_what_was_read_costs_its_connection(endpoint: Make, read: int) -> None:
    server = endpoint(whole(CONTENT))
    with server.running() as pool:
        for _ in range(2):
            assert received(pool, read) == CONTENT[:read]
    assert server.connections == 2


def test_a_body_that_is_left_early_costs_its_connection(endpoint: Make) -> None:
    def leave(_piece: Buffer) -> None:
        raise InterruptedError

    server = endpoint(whole(CONTENT))
    with server.running() as pool:
        with pytest.raises(InterruptedError), closing(get(pool)) as body:
            receive(body, len(CONTENT), leave, Unhurried())
        with closing(get(pool)):
            pass  # unread
        assert received(pool, len(CONTENT)) == CONTENT
    assert server.connections == 3


# Bodies without a length of their own


def in_chunks(client: socket.socket) -> None:
    client.sendall(head({"Transfer-Encoding": "chunked"}))
    for begin in range(0, 300_000, 7000):
        piece = CONTENT[begin : min(begin + 7000, 300_000)]
        client.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    client.sendall(b"0\r\n\r\n")


def compressed(client: socket.socket) -> None:
    body = gzip.compress(CONTENT[:300_000])
    client.sendall(head({"Content-Encoding": "gzip", "Content-Length": len(body)}) + body)


def until_the_end(client: socket.socket) -> None:
    client.sendall(head({"Connection": "close"}) + CONTENT[:300_000])
    raise ConnectionError


@pytest.mark.parametrize("answer", [in_chunks, compressed, until_the_end])
def test_bodies_without_a_plain_length_come_right(endpoint: Make, answer: Answer) -> None:
    with endpoint(answer).running() as pool:
        for sink in (Rooms(MIB), Rooms(1000, 9000)):
            with closing(get(pool, decode=True)) as body:
                receive(body, 300_000, sink, Unhurried())
            assert sink.content == CONTENT[:300_000]


# Failures


TRANSLATIONS = [
    pytest.param(lambda function: translated(function, "bucket", "key"), id="s3"),
    pytest.param(lambda function: failures.translated(function, StoreUnavailableError), id="others"),
]
Translation = Callable[[Callable[[], Any]], Any]


@pytest.mark.parametrize("come", [0, 100, 500_000])
def test_a_body_that_ends_early_is_a_passing_failure(endpoint: Make, come: int) -> None:
    server = endpoint(truncated(CONTENT[:come], length=len(CONTENT)))
    with server.running() as pool:
        for _ in range(2):
            with pytest.raises(TransientStoreError, match=f"the body ended after {come} of {len(CONTENT)} bytes"):
                received(pool, len(CONTENT))
    assert server.connections == 2


@pytest.mark.parametrize("translation", TRANSLATIONS)
def test_chunks_that_end_early_are_a_passing_failure(endpoint: Make, translation: Translation) -> None:
    def broken(client: socket.socket) -> None:
        client.sendall(head({"Transfer-Encoding": "chunked"}) + b"4000\r\n" + CONTENT[:1000])
        raise ConnectionError

    with endpoint(broken).running() as pool, pytest.raises(TransientStoreError):
        translation(lambda: received(pool, len(CONTENT)))


@pytest.mark.parametrize("translation", TRANSLATIONS)
def test_a_connection_that_is_reset_is_a_passing_failure(endpoint: Make, translation: Translation) -> None:
    read, came = threading.Event(), bytearray()
    sink = read_until(read, PIECE, came)
    server = endpoint(reset(CONTENT[:PIECE], length=len(CONTENT), read=read))
    with server.running() as pool, closing(get(pool)) as body, pytest.raises(TransientStoreError) as raised:
        translation(lambda: receive(body, len(CONTENT), sink, Unhurried()))
    assert not isinstance(raised.value, StoreStalledError)
    assert came == CONTENT[:PIECE]


@pytest.mark.parametrize("translation", TRANSLATIONS)
@pytest.mark.parametrize("come", [0, 100, PIECE])
def test_a_body_that_stalls_ends_after_the_timeout_of_its_socket(
    endpoint: Make, translation: Translation, come: int
) -> None:
    over = threading.Event()

    def stall(client: socket.socket) -> None:
        client.sendall(head({"Content-Length": len(CONTENT)}) + CONTENT[:come])
        over.wait(10)
        raise ConnectionError

    run: AbstractContextManager[urllib3.HTTPConnectionPool] = endpoint(stall).running(timeout_s=STALL_S)
    with run as pool:
        try:
            with closing(get(pool)) as body, pytest.raises(StoreStalledError):
                translation(lambda: receive(body, len(CONTENT), bytearray().extend, Unhurried()))
        finally:
            over.set()
