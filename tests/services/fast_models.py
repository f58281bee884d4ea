"""The fast endpoint in the words of a Hugging Face hub and of an OCI registry, read-only, for benchmarks.

A bucket is a repository. It holds the files whose SHA-256 is told, as both name contents by it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from urllib.parse import parse_qs, quote, unquote

from .buckets import S3Error, told
from .fast import LISTINGS, _Connection

OWNER = "fast"
SHA256 = "user.sha256"
"""Attribute of files with the digest that is told of them, in hexadecimal."""
CDN = "localhost"
"""The hub sends readers of bytes to another host: its own, by another name."""
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class _Models(_Connection):
    __slots__ = ()

    def _files(self, bucket: str) -> Iterator[tuple[str, str, int]]:
        """Key, SHA-256 and size of each file."""
        self.buckets.check(bucket)
        for key, _ in self.buckets.items(bucket, "", "", deep=True):
            path = self.buckets.path(bucket, key)
            digest = told(path, SHA256)
            if digest is not None:
                yield key, digest, os.stat(path).st_size

    def _json(self, name: str, value: object, about: Mapping[str, str] | None = None) -> None:
        self._told(name, json.dumps(value).encode(), {"Content-Type": "application/json", **(about or {})})

    def _told(self, name: str, body: bytes, about: Mapping[str, str]) -> None:
        self.counter.add(name, 1, len(body))
        self._send(HTTPStatus.OK, about, body)


class Hub(_Models):
    """Has one commit of each repository, and sends readers of bytes to a CDN, as a hub does for files in LFS."""

    __slots__ = ()

    def _answer(self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes) -> None:
        if path.startswith("/cdn/"):
            bucket, _, key = unquote(path.removeprefix("/cdn/")).partition("/")
            self._object(method, bucket, key, headers)
        elif found := re.fullmatch(rf"/{OWNER}/([^/]+)/resolve/[^/]+/(.+)", path):
            self._resolve(found[1], unquote(found[2]))
        elif found := re.fullmatch(rf"/api/models/{OWNER}/([^/]+)/([a-z-]+)(?:/[^/]+)?(?:/(.+))?", path):
            self._api(found[1], found[2], unquote(found[3] or ""), body)
        else:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey")

    def _api(self, bucket: str, call: str, path: str, body: bytes) -> None:
        files = {key: _entry(key, digest, size) for key, digest, size in self._files(bucket)}
        name = f"{bucket}{LISTINGS}"
        if call == "revision":
            self._json(name, {"sha": _commit(bucket), "lastModified": "2024-01-01T00:00:00.000Z"})
        elif call == "paths-info":
            self._json(name, [files[key] for key in parse_qs(body.decode()).get("paths", []) if key in files])
        elif call == "tree":
            prefix = f"{path}/" if path else ""
            below = [key.removeprefix(prefix) for key in files if key.startswith(prefix)]
            directories = sorted({key.partition("/")[0] for key in below if "/" in key})
            entries = [{"type": "directory", "path": prefix + each, "oid": "0" * 40, "size": 0} for each in directories]
            self._json(name, entries + [files[prefix + key] for key in below if "/" not in key])
        else:
            self._json(name, {})

    def _resolve(self, bucket: str, key: str) -> None:
        found = next((each for each in self._files(bucket) if each[0] == key), None)
        if found is None:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey")
        port = self.socket.getsockname()[1]
        about = {
            "Location": f"http://{CDN}:{port}/cdn/{bucket}/{quote(key)}",
            "X-Repo-Commit": _commit(bucket),
            "X-Linked-ETag": f'"{found[1]}"',
            "X-Linked-Size": str(found[2]),
        }
        self.counter.add(f"{bucket}{LISTINGS}", 1, 0)
        self._send(HTTPStatus.FOUND, about, b"")


def _entry(key: str, digest: str, size: int) -> dict[str, object]:
    return {"type": "file", "path": key, "oid": "0" * 40, "size": size, "lfs": {"oid": digest, "size": size}}


def _commit(bucket: str) -> str:
    return hashlib.sha1(bucket.encode(), usedforsecurity=False).hexdigest()


class Registry(_Models):
    """Has one artifact in each repository, whose layers are the files."""

    __slots__ = ()

    def _answer(self, method: str, path: str, query: str, headers: Mapping[str, str], body: bytes) -> None:
        found = re.fullmatch(r"/v2/([^/]+)/(manifests|blobs)/(.+)", path)
        if found is None:
            raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey")
        bucket, kind, wanted = found.groups()
        if kind == "manifests":
            manifest = self._manifest(bucket)
            digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
            about = {"Content-Type": _MANIFEST, "Docker-Content-Digest": digest}
            if method == "HEAD":
                self._send(HTTPStatus.OK, about, b"", len(manifest))
            else:
                self._told(f"{bucket}{LISTINGS}", manifest, about)
            return
        for key, digest, _ in self._files(bucket):
            if wanted == f"sha256:{digest}":
                self._object(method, bucket, key, headers)
                return
        raise S3Error(HTTPStatus.NOT_FOUND, "NoSuchKey")

    def _manifest(self, bucket: str) -> bytes:
        layers = [
            {
                "mediaType": "application/octet-stream",
                "digest": f"sha256:{digest}",
                "size": size,
                "annotations": {"org.opencontainers.image.title": key},
            }
            for key, digest, size in self._files(bucket)
        ]
        return json.dumps({"schemaVersion": 2, "mediaType": _MANIFEST, "layers": layers}).encode()
