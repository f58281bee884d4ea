"""A fast endpoint for benchmarks, in a process of its own. It emulates S3, read-only, and checks no signatures.

Serves the directories in ``--root`` as buckets, path style. Bodies go from the page cache to the socket by sendfile(2),
so that on loopback what is measured is the client.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from . import HOST, S3Server, started
from .buckets import CHECKSUM, Buckets, S3Error, etag, told

STATISTICS = "/__statistics"
LISTINGS = "?list"
PAGE_LIMIT = 1000
HEAD_LIMIT = 1 << 16
PIECE = 1 << 20
"""Most bytes given to sendfile at a time; they are counted before each."""
PACE_S = 0.005
"""Time between two pieces of a body whose rate is limited."""
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class Traffic(NamedTuple):
    """Requests answered, and bytes of their bodies."""

    requests: int
    body_bytes: int


@dataclass(frozen=True, slots=True)
class FastS3(S3Server):
    """A running endpoint."""

    def store(self, bucket: str) -> str:
        """The URL of a bucket."""
        return f"s3://{bucket}"

    def statistics(self) -> dict[str, Traffic]:
        """Traffic since the start or `reset`: of objects by BUCKET/KEY, of listings by BUCKET?list."""
        counted: dict[str, list[int]] = json.loads(self._ask("GET"))
        return {name: Traffic(*counts) for name, counts in counted.items()}

    def reset(self) -> None:
        """Count from zero."""
        self._ask("DELETE")

    def _ask(self, method: str) -> bytes:
        netloc = urlsplit(self.endpoint_url).netloc
        with contextlib.closing(http.client.HTTPConnection(netloc, timeout=10)) as connection:
            connection.request(method, STATISTICS)
            return connection.getresponse().read()


@contextlib.contextmanager
def start_fast(root: Path, *, latency_ms: float = 0, rate: int = 0) -> Iterator[FastS3]:
    """Serve the buckets in *root* until the context ends; any credentials do.

    Every response waits *latency_ms* before its first byte; a connection gets *rate* bytes of bodies a second, 0 for as
    many as there are. Raises as `started`.
    """
    with started("fast", partial(command_of, __name__, root, latency_ms, rate)) as (ports, _):
        yield FastS3(f"http://{HOST}:{ports[0]}", "fast", "fast")


def command_of(module: str, root: Path, latency_ms: float, rate: int, ports: range) -> list[str]:
    """The command line of an endpoint."""
    options = {"port": ports[0], "root": root.absolute(), "latency-ms": latency_ms, "rate": rate}
    return [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in options.items())]


@dataclass(slots=True)
class _Counter:
    _counts: dict[str, list[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, requests: int, body_bytes: int) -> None:
        with self._lock:
            counts = self._counts.setdefault(name, [0, 0])
            counts[0] += requests
            counts[1] += body_bytes

    def json(self) -> bytes:
        with self._lock:
            return json.dumps(self._counts).encode()

    def clear(self) -> None:
        with self._lock:
            self._counts.clear()


@dataclass(frozen=True, slots=True)
class _Connection:
    """One client's connection, served by a thread."""

    socket: socket.socket
    buckets: Buckets
    counter: _Counter
    latency_s: float
    rate: int

    def serve(self) -> None:
        """Answer requests until the client goes."""
        rest = b""
        with self.socket, contextlib.suppress(ConnectionError):
            while True:
                while b"\r\n\r\n" not in rest:
                    piece = self.socket.recv(HEAD_LIMIT)
                    if not piece or len(rest) > HEAD_LIMIT:
                        return
                    rest += piece
                head, _, rest = rest.partition(b"\r\n\r\n")
                request, *lines = head.decode("latin-1").split("\r\n")
                method, target, _ = request.split(" ", 2)
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                if target == STATISTICS:
                    self._statistics(method)
                    continue
                body, length = rest, int(headers.get("content-length", 0))
                while len(body) < length and (piece := self.socket.recv(HEAD_LIMIT)):
                    body += piece
                body, rest = body[:length], body[length:]
                time.sleep(self.latency_s)
                try:
                    path, _, query = target.partition("?")
                    self._answer(method, path, query, headers, body)
                except S3Error as error:
                    said = "" if method == "HEAD" else f"{_XML}<Error><Code>{error.code}</Code></Error>"
                    self._send(error.status, {"Content-Type": "application/xml"}, said.encode())

    def _statistics(self, method: str) -> None:
        if method == "DELETE":
            self.counter.clear()
        self._send(HTTPStatus.OK, {"Content-Type": "application/json"}, self.counter.json())

    def _answer(self, method: str, path: str, query: str, headers: Mapping[str, str], _body: bytes) -> None:
        if method not in {"GET", "HEAD"}:
            raise S3Error(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowed")
        bucket, _, key = unquote(path, errors="surrogateescape").removeprefix("/").partition("/")
        self.buckets.check(bucket)
        if key:
            self._object(method, bucket, key, headers)
            return
        options = dict(parse_qsl(query, keep_blank_values=True, errors="surrogateescape"))
        if "location" in options:
            body = f"<LocationConstraint {_NAMESPACE}/>"
        else:
            body = "" if method == "HEAD" else self._list(bucket, options)
            self.counter.add(f"{bucket}{LISTINGS}", 1, len(body))
        self._send(HTTPStatus.OK, {"Content-Type": "application/xml"}, (_XML + body).encode() if body else b"")

    def _object(self, method: str, bucket: str, key: str, headers: Mapping[str, str]) -> None:
        descriptor = self.buckets.open(bucket, key)
        try:
            self._send_object(method, f"{bucket}/{key}", descriptor, headers)
        finally:
            os.close(descriptor)

    def _send_object(
        self, method: str, name: str, descriptor: int, headers: Mapping[str, str], more: Mapping[str, str] | None = None
    ) -> None:
        """Send an object, or what a HEAD request asks of it, with *more* headers."""
        facts = os.fstat(descriptor)
        tag = etag(descriptor, facts)
        if stat.S_ISDIR(facts.st_mode):
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey")
        if headers.get("if-match", tag).strip('"') not in {tag.strip('"'), "*"}:
            raise S3Error(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        span = _span(headers.get("range"), facts.st_size)
        about = {
            "ETag": tag,
            "Last-Modified": formatdate(facts.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
            **(more or {}),
        }
        checksum = told(descriptor, CHECKSUM) if headers.get("x-amz-checksum-mode") == "ENABLED" else None
        if checksum is not None and span is None:
            about |= {"x-amz-checksum-crc64nvme": checksum, "x-amz-checksum-type": "FULL_OBJECT"}
        if span is not None:
            about["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{facts.st_size}"
        status = HTTPStatus.OK if span is None else HTTPStatus.PARTIAL_CONTENT
        body = span if span is not None else range(facts.st_size)
        self.counter.add(name, 1, 0)
        self._send(status, about, b"", len(body), more=method == "GET" and len(body) > 0)
        if method == "GET":
            self._send_file(descriptor, body, name)

    def _send_file(self, descriptor: int, span: range, name: str) -> None:
        begun = time.monotonic()
        most = min(PIECE, max(1, int(self.rate * PACE_S))) if self.rate else PIECE
        position = span.start
        while position < span.stop:
            if self.rate:
                time.sleep(max(0, begun + (position - span.start) / self.rate - time.monotonic()))
            count = min(most, span.stop - position)
            self.counter.add(name, 0, count)
            end = position + count
            while position < end:
                sent = os.sendfile(self.socket.fileno(), descriptor, position, end - position)
                if not sent:
                    raise ConnectionError("the file has shrunk")
                position += sent

    def _list(self, bucket: str, options: Mapping[str, str]) -> str:
        second = options.get("list-type") == "2"
        after = options.get("continuation-token") or options.get("start-after" if second else "marker") or ""
        limit = min(int(options.get("max-keys") or PAGE_LIMIT), PAGE_LIMIT)
        prefix, delimiter = options.get("prefix", ""), options.get("delimiter", "")
        if delimiter not in {"", "/"}:
            raise S3Error(HTTPStatus.NOT_IMPLEMENTED, "NotImplemented")
        text = quote if options.get("encoding-type") == "url" else escape
        found = list(islice(self.buckets.items(bucket, prefix, after, deep=not delimiter), limit + 1))
        page, truncated = found[:limit], len(found) > limit > 0
        parts = [f"<Contents><Key>{text(key)}</Key>{about}</Contents>" for key, about in page if about]
        parts += [f"<CommonPrefixes><Prefix>{text(key)}</Prefix></CommonPrefixes>" for key, about in page if not about]
        fields = {"Name": bucket, "Prefix": text(prefix), "MaxKeys": limit, "IsTruncated": str(truncated).lower()}
        if delimiter:
            fields["Delimiter"] = delimiter
        if options.get("encoding-type") == "url":
            fields["EncodingType"] = "url"
        if second:
            fields["KeyCount"] = len(page)
        if truncated:
            last = page[-1][0]
            fields["NextContinuationToken" if second else "NextMarker"] = escape(last) if second else text(last)
        heading = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
        return f"<ListBucketResult {_NAMESPACE}>{heading}{''.join(parts)}</ListBucketResult>"

    def _send(
        self,
        status: HTTPStatus,
        about: Mapping[str, str],
        body: bytes,
        length: int | None = None,
        *,
        more: bool = False,
    ) -> None:
        fields = {"Content-Length": len(body) if length is None else length, "x-amz-request-id": "0", **about}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        # With MSG_MORE the head leaves with the first bytes of the body.
        flags = socket.MSG_MORE if more else 0
        self.socket.sendall(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode() + body, flags)


def _span(text: str | None, size: int) -> range | None:
    """The bytes that a Range header asks for; None for all of them without one."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", text or "")
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    begin = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if begin >= end:
        raise S3Error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "InvalidRange")
    return range(begin, end)


def main(connections: Mapping[str, type[_Connection]] | None = None) -> None:
    """Serve until killed, by the kind of connection that ``--kind`` names, if there is a choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    if connections is not None:
        parser.add_argument("--kind", choices=connections, required=True)
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--latency-ms", type=float, default=0)
    parser.add_argument("--rate", type=int, default=0, help="bytes a second for each connection")
    options = parser.parse_args()
    buckets, counter = Buckets(options.root), _Counter()
    kind = _Connection if connections is None else connections[options.kind]
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.create_server((options.host, options.port), family=family, backlog=512) as listener:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = kind(client, buckets, counter, options.latency_ms / 1000, options.rate)
            threading.Thread(target=connection.serve, daemon=True).start()


if __name__ == "__main__":
    main()
