"""The process of the proxy in `tests.services.faulty`: all that can be done to an answer of an S3 server."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from . import HOST
from .faulty import CONTROL, Plan

PIECE = 1 << 18
DRIP = 1024
DRIP_PAUSE_S = 0.05
"""1 KiB every 50 ms: bytes all the time, and less than any client should put up with."""
PATIENCE_S = 60
"""How long a connection stays when nothing comes of it."""
_BAD_GATEWAY = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
_SIGN_IN = b"<html><body>Please sign in<br></body></html>"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server has answered."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def with_header(self, name: str, value: str | None) -> Answer:
        """The same with another header, or without it."""
        others = tuple(pair for pair in self.headers if pair[0].lower() != name.lower())
        return Answer(self.status, others if value is None else (*others, (name, value)), self.body)

    def with_body(self, body: bytes) -> Answer:
        """The same with another body, of which it tells the length."""
        return Answer(self.status, self.headers, body).with_header("Content-Length", str(len(body)))

    def header(self, name: str) -> str:
        return next(value for known, value in self.headers if known.lower() == name.lower())


class Exchange(BaseHTTPRequestHandler):
    """One connection of a client, and the requests on it one after the other."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    target: str
    upstream: http.client.HTTPConnection

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.settimeout(PATIENCE_S)
        self.upstream = http.client.HTTPConnection(self.target, timeout=PATIENCE_S)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client is gone
            super().handle()

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the name in the base class
        """Nobody wants to know."""

    def do_PUT(self) -> None:
        """Only the tests themselves put anything, a plan."""
        self.faults.follow(Plan(**json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send(Answer(200, (), b"").with_body(b""))

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self.path == CONTROL:
            self.send(Answer(200, (), b"").with_body(json.dumps(self.faults.counted()).encode()))
        else:
            self._answer()

    def _answer(self) -> None:
        bucket_only = "/" not in urlsplit(self.path).path.strip("/")
        kind = "head" if self.command == "HEAD" else "list" if bucket_only else "get"
        name = self.faults.draw(kind, f"{self.command} {self.path} {self.headers.get('Range')}")
        try:
            if name is None:
                self.forward()
            else:
                (FAULTS | OTHERS)[name].act(self)
        except (http.client.HTTPException, ConnectionError, TimeoutError):
            self.close_connection = True  # one of the two ends is gone

    def forward(self) -> None:
        """Pass the server's answer on."""
        try:
            response = self._asked()
        except (http.client.HTTPException, OSError):
            self.upstream.close()
            self.send(Answer(502, (("Content-Type", "text/html"),), b"").with_body(_BAD_GATEWAY))
            return
        if response.chunked:
            self.send(_whole(response))
            return
        self.send_head(Answer(response.status, tuple(response.getheaders()), b""))
        while piece := response.read(PIECE):
            self.connection.sendall(piece)

    def ask(self) -> Answer:
        """What the server answers to this request."""
        return _whole(self._asked())

    def _asked(self) -> http.client.HTTPResponse:
        self.upstream.close()  # a new connection each time is never one that the server has just closed
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            self.upstream.putheader(name, value)
        self.upstream.endheaders()
        return self.upstream.getresponse()

    # What faults are made of

    def send(self, answer: Answer) -> None:
        """Send a whole answer."""
        self.send_head(answer)
        if self.command != "HEAD":
            self.connection.sendall(answer.body)

    def send_head(self, answer: Answer) -> None:
        self.connection.sendall(self.head(answer))

    def head(self, answer: Answer) -> bytes:
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in answer.headers]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def reset(self) -> None:
        """Break the connection off, as a crash or a firewall does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # a shutdown, as the base class does it, would end it in order

    def stall(self) -> None:
        """Stay connected, and send nothing more until the client gives up."""
        self.close_connection = True
        self.connection.recv(1)

    def drip(self, data: bytes, size: int = DRIP) -> None:
        """Send bytes slowly."""
        for start in range(0, len(data), size):
            self.connection.sendall(data[start : start + size])
            time.sleep(DRIP_PAUSE_S)


def _whole(response: http.client.HTTPResponse) -> Answer:
    headers = tuple(pair for pair in response.getheaders() if pair[0].lower() != "transfer-encoding")
    answer = Answer(response.status, headers, response.read())
    return answer.with_body(answer.body) if response.chunked else answer


Act = Callable[[Exchange], None]
ALL = frozenset({"get", "head", "list"})
BODIES = frozenset({"get", "list"})


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done, and to which kinds of requests it can happen."""

    act: Act
    kinds: frozenset[str] = ALL


def _refuse(status: int, code: str, headers: Mapping[str, str] | None = None) -> Fault:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
    answer = Answer(status, tuple((headers or {}).items()), b"").with_body(body if code else _BAD_GATEWAY)
    return Fault(lambda exchange: exchange.send(answer))


def _early_hints(exchange: Exchange) -> None:
    """An interim answer before the answer."""
    exchange.connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n")
    exchange.forward()


def _hang_up(exchange: Exchange) -> None:
    exchange.close_connection = True


def _in_body(then: Act) -> Fault:
    """Half of a body, and then something else."""

    def act(exchange: Exchange) -> None:
        answer = exchange.ask()
        exchange.send_head(answer)
        exchange.connection.sendall(answer.body[: len(answer.body) // 2])
        then(exchange)

    return Fault(act, BODIES)


def _changed(change: Callable[[Answer], Answer], kinds: frozenset[str] = frozenset({"get"})) -> Fault:
    """A whole answer that is not what the server has said."""

    def act(exchange: Exchange) -> None:
        answer = exchange.ask()
        exchange.send(change(answer) if answer.status in {200, 206} else answer)

    return Fault(act, kinds)


def _slow_body(exchange: Exchange) -> None:
    answer = exchange.ask()
    exchange.send_head(answer)
    exchange.drip(answer.body)


def _slow_head(exchange: Exchange) -> None:
    answer = exchange.ask()
    exchange.drip(exchange.head(answer), 1)
    exchange.connection.sendall(answer.body)


def _flipped(answer: Answer) -> Answer:
    body = bytearray(answer.body)
    if body:
        body[len(body) // 3] ^= 0x10
    return Answer(answer.status, answer.headers, bytes(body))


def _other_range(answer: Answer) -> Answer:
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.header("Content-Range"))
    assert match is not None
    first, last, size = map(int, match.groups())
    return answer.with_header("Content-Range", f"bytes {first + 1}-{last + 1}/{size + 1}")


def _shorter(answer: Answer) -> Answer:
    return answer.with_header("Content-Length", str(len(answer.body) // 2))


def _no_range(answer: Answer) -> Answer:
    """As from a server or proxy that does not know ranges: nothing tells which bytes these are."""
    return Answer(200, answer.headers, answer.body).with_header("Content-Range", None)


def _lost_keys(answer: Answer) -> Answer:
    """Every other key is missing, and the count of keys tells so."""
    found = re.findall(rb"<Contents>.*?</Contents>", answer.body, re.DOTALL)
    body = answer.body
    for lost in found[::2]:
        body = body.replace(lost, b"")
    return answer.with_body(body)


def _lost_page(exchange: Exchange) -> None:
    """Of each listing, the first keys only, and an error instead of the rest."""
    if "continuation-token=" in exchange.path:
        FAULTS["internal error"].act(exchange)
        return
    answer = exchange.ask()
    found = re.findall(rb"<Contents>.*?</Contents>", answer.body, re.DOTALL)
    body = answer.body
    for later in found[1:]:
        body = body.replace(later, b"")
    body = body.replace(b"<KeyCount>%d<" % len(found), b"<KeyCount>1<")
    if len(found) > 1:
        last = re.search(rb"<Key>(.*?)</Key>", found[0])
        assert last is not None
        more = b"<IsTruncated>true</IsTruncated><NextContinuationToken>%s</NextContinuationToken>" % last[1]
        body = body.replace(b"<IsTruncated>false</IsTruncated>", more)
    exchange.send(answer.with_body(body))


def _no_token(answer: Answer) -> Answer:
    """More is to come, and not how to ask for it."""
    return answer.with_body(answer.body.replace(b"<IsTruncated>false<", b"<IsTruncated>true<"))


def _no_end(answer: Answer) -> Answer:
    """There is always a next page, which is the first."""
    more = b"<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>"
    return answer.with_body(answer.body.replace(b"<IsTruncated>false</IsTruncated>", more))


LISTS = frozenset({"list"})

FAULTS: dict[str, Fault] = {
    "slow down": _refuse(503, "SlowDown"),
    "too many requests": _refuse(429, "TooManyRequests"),
    "internal error": _refuse(500, "InternalError"),
    "request timeout": _refuse(400, "RequestTimeout"),
    "bad gateway": _refuse(502, ""),
    "reset": Fault(Exchange.reset),
    "hang up": Fault(_hang_up),
    "stall": Fault(Exchange.stall),
    "slow head": Fault(_slow_head),
    "reset in the body": _in_body(Exchange.reset),
    "truncated body": _in_body(_hang_up),
    "stall in the body": _in_body(Exchange.stall),
    "slow body": Fault(_slow_body, frozenset({"get"})),
    "flipped bit": _changed(_flipped),
    "wrong Content-Range": _changed(_other_range),
    "short Content-Length": _changed(_shorter),
    "200 instead of 206": _changed(_no_range),
    "no ETag": _changed(lambda answer: answer.with_header("ETag", None)),
    "wrong ETag": _changed(lambda answer: answer.with_header("ETag", f'"{"0" * 32}"')),
    "listing cut off": _changed(lambda answer: answer.with_body(answer.body[: len(answer.body) // 2]), LISTS),
    "listing without a token": _changed(_no_token, LISTS),
    "listing that lost keys": _changed(_lost_keys, LISTS),
    "listing that lost a page": Fault(_lost_page, LISTS),
    "listing that is a web page": _changed(lambda answer: answer.with_body(_SIGN_IN), LISTS),
    "expired token": _refuse(400, "ExpiredToken"),
    "unknown access key": _refuse(403, "InvalidAccessKeyId"),
    "wrong signature": _refuse(403, "SignatureDoesNotMatch"),
    "access denied": _refuse(403, "AccessDenied"),
    "clock skew": _refuse(403, "RequestTimeTooSkewed"),
    "temporary redirect": _refuse(307, "TemporaryRedirect", {"Location": "http://127.0.0.1:1/"}),
    "permanent redirect": _refuse(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"}),
}


OTHERS: dict[str, Fault] = {
    "early hints": Fault(_early_hints),
    "listing without an end": _changed(_no_end, LISTS),
    "no such object": Fault(_refuse(404, "NoSuchKey").act, frozenset({"get"})),
}
"""What not every client can tell, or none takes for a failure."""


@dataclass(slots=True)
class Faults:
    """Who gets which fault, and how many there were."""

    _plan: Plan = field(default_factory=lambda: Plan(faults=()))
    _attempts: Counter[str] = field(default_factory=Counter)
    _counted: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def follow(self, plan: Plan) -> None:
        """Do as a plan says, of which no attempt has been made."""
        with self._lock:
            self._plan = plan
            self._attempts.clear()

    def counted(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counted)

    def draw(self, kind: str, request: str) -> str | None:
        """The fault that this attempt at a request meets, if any."""
        with self._lock:
            self._attempts[request] += 1
            attempt, plan = self._attempts[request], self._plan
            possible = [name for name in plan.faults if kind in (FAULTS | OTHERS)[name].kinds]
            if not possible or plan.only not in request or (plan.first is not None and attempt > plan.first):
                return None
            dice = random.Random(f"{plan.seed} {attempt} {request}")
            if dice.random() >= plan.share:
                return None
            name = dice.choice(possible)
            self._counted[name] += 1
            return name


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--target", required=True, help="HOST:PORT of the server")
    options = parser.parse_args()
    Exchange.faults = Faults()
    Exchange.target = options.target
    with _Server((HOST, options.port), Exchange) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
