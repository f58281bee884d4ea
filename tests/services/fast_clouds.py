"""The fast endpoint in the words of Google Cloud Storage and of Azure Blob Storage, read-only, for benchmarks; also
`fast_models`.

It pages listings as these services do, which their stand-ins do not: names of objects and of directories count alike.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

from trimsfs.stores import digests

from . import HOST, started
from .buckets import S3Error, etag, told
from .fast import LISTINGS, PAGE_LIMIT, FastS3, _Connection, command_of, main
from .fast_models import OWNER, SHA256, Hub, Registry

Kind = Literal["gs", "az", "hf", "oci"]
ACCOUNT = "fast"
CRC32C, MD5 = "user.crc32c", "user.md5"
"""Attributes of files with the digests that are told of them, as base64."""


def uploaded_to_cloud(path: Path) -> None:
    """Have an endpoint tell the digests of a file, which must not change any more."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        os.setxattr(path, CRC32C, base64.b64encode(digests.compute(file.fileno(), size, "crc32c", 0) or b""))
        os.setxattr(path, MD5, base64.b64encode(digests.compute(file.fileno(), size, "md5", 0) or b""))
        os.setxattr(path, SHA256, (digests.compute(file.fileno(), size, "sha256", 0) or b"").hex().encode())


@dataclass(frozen=True, slots=True)
class FastCloud(FastS3):
    """A running endpoint of a kind other than S3."""

    kind: Kind = "gs"

    def store(self, bucket: str) -> str:
        """The URL of a bucket."""
        if self.kind == "oci":
            return f"oci://{urlsplit(self.endpoint_url).netloc}/{bucket}"
        return f"hf://{OWNER}/{bucket}" if self.kind == "hf" else f"{self.kind}://{bucket}"

    def environment(self) -> dict[str, str]:
        """The variables with which the kind's own tools reach this server."""
        if self.kind == "gs":
            return {"STORAGE_EMULATOR_HOST": self.endpoint_url}
        if self.kind == "hf":
            return {"HF_ENDPOINT": self.endpoint_url}
        if self.kind == "oci":
            return {}
        key = base64.b64encode(b"any").decode()
        account = f"AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={self.endpoint_url}/{ACCOUNT}"
        return {"AZURE_STORAGE_CONNECTION_STRING": account}


@contextlib.contextmanager
def start_fast_cloud(kind: Kind, root: Path, *, latency_ms: float = 0, rate: int = 0) -> Iterator[FastCloud]:
    """As `fast.start_fast`, but as another kind of store."""
    command = partial(command_of, __name__, root, latency_ms, rate)
    with started(f"fast-{kind}", lambda ports: [*command(ports), f"--kind={kind}"]) as (ports, _):
        yield FastCloud(f"http://{HOST}:{ports[0]}", "fast", "fast", kind=kind)


class _Cloud(_Connection):
    __slots__ = ()

    def _page(self, bucket: str, prefix: str, after: str, limit: int) -> tuple[list[str], str | None]:
        """The names of a page, those of directories ending in ``/``, and the last one if there are more."""
        found = [key for key, _ in islice(self.buckets.items(bucket, prefix, after, deep=False), limit + 1)]
        page = found[:limit]
        return page, page[-1] if len(found) > limit else None


class _Google(_Cloud):
    __slots__ = ()

    def _answer(self, method: str, path: str, query: str, headers: Mapping[str, str], _body: bytes) -> None:
        match = re.fullmatch(r"/storage/v1/b/([^/]+)/o(?:/([^/]+))?", path)
        if match is None or method != "GET":
            raise S3Error(HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowed")
        options = dict(parse_qsl(query, keep_blank_values=True))
        bucket = match[1]
        self.buckets.check(bucket)
        if match[2] is None:
            limit = min(int(options.get("maxResults") or PAGE_LIMIT), PAGE_LIMIT)
            page, last = self._page(bucket, options.get("prefix", ""), options.get("pageToken", ""), limit)
            answer: dict[str, object] = {
                "items": [self._about(bucket, key) for key in page if not key.endswith("/")],
                "prefixes": [key for key in page if key.endswith("/")],
                **({} if last is None else {"nextPageToken": last}),
            }
            self._json(f"{bucket}{LISTINGS}", answer)
            return
        key = unquote(match[2])
        about = self._about(bucket, key)
        if options.get("alt") != "media":
            self._json(f"{bucket}/{key}", about)
            return
        if options.get("generation", about["generation"]) != about["generation"]:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey")
        descriptor = self.buckets.open(bucket, key)
        try:
            more = {"x-goog-generation": str(about["generation"])}
            self._send_object("GET", f"{bucket}/{key}", descriptor, headers, more)
        finally:
            os.close(descriptor)

    def _about(self, bucket: str, key: str) -> dict[str, object]:
        path = self.buckets.path(bucket, key)
        try:
            facts = os.stat(path)
        except OSError:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey") from None
        return {
            "name": key,
            "size": str(facts.st_size),
            "generation": str(facts.st_mtime_ns),
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "crc32c": told(path, CRC32C),
            "md5Hash": told(path, MD5),
        }

    def _json(self, name: str, answer: dict[str, object]) -> None:
        body = json.dumps(answer).encode()
        self.counter.add(name, 1, len(body))
        self._send(HTTPStatus.OK, {"Content-Type": "application/json"}, body)


class _Azure(_Cloud):
    __slots__ = ()

    def _answer(self, method: str, path: str, query: str, headers: Mapping[str, str], _body: bytes) -> None:
        container, _, key = unquote(path).removeprefix(f"/{ACCOUNT}/").partition("/")
        self.buckets.check(container)
        if key:
            self._object(method, container, key, headers)
            return
        options = dict(parse_qsl(query, keep_blank_values=True))
        limit = min(int(options.get("maxresults") or PAGE_LIMIT), PAGE_LIMIT)
        page, last = self._page(container, options.get("prefix", ""), options.get("marker", ""), limit)
        blobs = "".join(
            f"<BlobPrefix><Name>{escape(key)}</Name></BlobPrefix>" if key.endswith("/") else self._blob(container, key)
            for key in page
        )
        body = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>{escape(last or '')}</NextMarker>"
        self.counter.add(f"{container}{LISTINGS}", 1, len(body))
        self._send(HTTPStatus.OK, {"Content-Type": "application/xml"}, f"{body}</EnumerationResults>".encode())

    def _send_object(
        self, method: str, name: str, descriptor: int, headers: Mapping[str, str], more: Mapping[str, str] | None = None
    ) -> None:
        md5 = told(descriptor, MD5)
        own = {} if md5 is None or "range" in headers else {"Content-MD5": md5}
        super()._send_object(method, name, descriptor, headers, {**own, **(more or {})})

    def _blob(self, container: str, key: str) -> str:
        path = self.buckets.path(container, key)
        facts = os.stat(path)
        fields = {
            "Last-Modified": formatdate(facts.st_mtime, usegmt=True),
            "Etag": etag(path, facts).strip('"'),
            "Content-Length": facts.st_size,
            "Content-MD5": told(path, MD5) or "",
        }
        about = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
        return f"<Blob><Name>{escape(key)}</Name><Properties>{about}</Properties></Blob>"


if __name__ == "__main__":
    main({"gs": _Google, "az": _Azure, "hf": Hub, "oci": Registry})
