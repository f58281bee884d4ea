"""A store that lies: an HTTP server that answers as S3 does, but for what a test has it say."""

import contextlib
import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

from tests.services import S3Server
from tests.support.http_server import Server

MODIFIED = "2024-05-06T07:08:09.000Z"
HTTP_MODIFIED = "Mon, 06 May 2024 07:08:09 GMT"
BUCKET = "bucket"


@dataclass(slots=True, kw_only=True)
class Told:
    """What the store says of an object, right or not; None leaves it out."""

    content: bytes = b""
    etag: str | None = '"0123456789abcdef"'
    size: str | None = None
    modified: str | None = None
    content_range: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> str:
        return str(len(self.content)) if self.size is None else self.size


Answer = tuple[int, dict[str, str], bytes]


@dataclass(slots=True)
class HostileStore:
    """A running one. ``objects`` are by their keys; ``answer`` may stand in for what is said to a request, by its
    method, key and query."""

    objects: dict[bytes, Told]
    answer: Callable[[str, bytes, dict[str, str]], Answer | Iterator[bytes] | None] = lambda *_: None
    http: Server = field(init=False)

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def server(self) -> S3Server:
        return S3Server(self.http.url, "AKIDHOSTILE", "secret")

    def said(self, request: BaseHTTPRequestHandler) -> bytes | Iterator[bytes]:
        """The answer to a request, byte by byte."""
        url = urlsplit(request.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        key = unquote_to_bytes(url.path)[len(f"/{BUCKET}/") :]
        found = self.answer(request.command, key, query)
        if found is None:
            found = self._object(key, request) if key else self._listing(query)
        if not isinstance(found, tuple):
            return found
        status, headers, body = found
        lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in headers.items())]
        if not any(name.lower() in {"content-length", "transfer-encoding"} for name in headers):
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")
        return head if request.command == "HEAD" else head + body

    def _object(self, key: bytes, request: BaseHTTPRequestHandler) -> Answer:
        told = self.objects.get(key)
        if told is None:
            return 404, {}, b""
        headers = {"Last-Modified": told.modified or HTTP_MODIFIED, **told.headers}
        if told.etag is not None:
            headers["ETag"] = told.etag
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range") or "")
        if request.command == "HEAD" or match is None:
            return 200, {**headers, "Content-Length": told.length}, told.content
        first, last = int(match[1]), int(match[2])
        body = told.content[first : last + 1]
        headers["Content-Range"] = told.content_range or f"bytes {first}-{first + len(body) - 1}/{told.length}"
        return 206, headers, body

    def _listing(self, query: dict[str, str]) -> Answer:
        prefix = query.get("prefix", "").encode()
        first, most = int(query.get("continuation-token", 0)), int(query.get("max-keys", 1000))
        objects, below = [], set()
        for key, told in sorted(self.objects.items()):
            name, slash, _ = key[len(prefix) :].partition(b"/")
            if key.startswith(prefix) and slash:
                below.add(prefix + name + slash)
            elif key.startswith(prefix):
                objects.append((key, told))
        page = objects[first : first + most]
        more = first + most if len(objects) > first + most else None
        return 200, {"Content-Type": "application/xml"}, listing(page, [] if first else sorted(below), more)


def listing(objects: list[tuple[bytes, Told]], prefixes: list[bytes], more: int | None = None) -> bytes:
    """What a page of a listing looks like, with names as URLs have them; *more* is where the next one begins."""
    text = '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><EncodingType>url</EncodingType>'
    text += f"<IsTruncated>{'false' if more is None else 'true'}</IsTruncated>"
    text += "" if more is None else f"<NextContinuationToken>{more}</NextContinuationToken>"
    for key, told in objects:
        etag = "" if told.etag is None else f"<ETag>{_escaped(told.etag)}</ETag>"
        text += (
            f"<Contents><Key>{quote(key)}</Key><LastModified>{told.modified or MODIFIED}</LastModified>{etag}"
            f"<Size>{told.length}</Size></Contents>"
        )
    for prefix in prefixes:
        text += f"<CommonPrefixes><Prefix>{quote(prefix)}</Prefix></CommonPrefixes>"
    return (text + "</ListBucketResult>").encode()


def _escaped(text: str) -> str:
    return "".join(f"&#{ord(one)};" if one in '<>&"\n\r\t' else one for one in text)


@contextlib.contextmanager
def hostile_store(objects: dict[bytes, Told], *, certificate: Path | None = None) -> Iterator[HostileStore]:
    """A store with these objects; by TLS with a certificate, which is in a file with its key."""
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
    store = HostileStore(objects)
    with Server(store.said, tls).running() as store.http:
        yield store
