"""Google Cloud Storage, by its JSON API: every read names a generation number, which no other content ever has."""

import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from trimsfs.errors import ConfigurationError, ObjectNotFoundError
from trimsfs.extras.stores.cloud.cloud_store import CloudStore
from trimsfs.extras.stores.cloud.connections import Answer, Connections, Request, unsigned
from trimsfs.extras.stores.cloud.gcs_credentials import REMEDY, default_credentials
from trimsfs.extras.stores.cloud.service import content_name, etag_of
from trimsfs.options import MountOptions
from trimsfs.stores.base import Page, moment
from trimsfs.stores.http.bodies import METADATA_THREADS
from trimsfs.stores.http.endpoints import checked_endpoint
from trimsfs.types import Generation

ENDPOINT = "https://storage.googleapis.com"
_FIELDS = "name,size,generation,timeCreated,crc32c,md5Hash"


def open_bucket(url: str, options: MountOptions, *, max_requests: int) -> CloudStore:
    """The store ``gs://BUCKET[/PREFIX]``. Raises ConfigurationError."""
    bucket, _, prefix = url.partition("://")[2].partition("/")  # not parsed as a URL: a prefix may hold any character
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,221}", bucket):
        raise ConfigurationError(f"store {url!r}: {bucket!r} is not a bucket name: write gs://BUCKET[/PREFIX]")
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator and "://" not in emulator:
        emulator = f"http://{emulator}"
    emulated = bool(emulator) and options.endpoint_url is None
    endpoint = checked_endpoint(options.endpoint_url if options.endpoint_url is not None else emulator or ENDPOINT)
    service = GoogleStorage(endpoint, bucket)
    connections = Connections(
        endpoint,
        unsigned if options.anonymous or emulated else default_credentials(service.subject, url, options.stall_timeout),
        connections=max_requests + METADATA_THREADS,
        stall_timeout_s=options.stall_timeout,
    )
    return CloudStore(service, connections, prefix, max_requests=max_requests, stall_timeout_s=options.stall_timeout)


class GoogleStorage:
    """A bucket. Sizes, generations and digests come from listings and metadata alike."""

    product = "Google Cloud Storage"
    remedy = REMEDY

    def __init__(self, endpoint: str, bucket: str) -> None:
        self.subject = f"bucket {bucket}"
        self.url = f"{endpoint}|gs://{bucket}"
        self._objects = f"/storage/v1/b/{bucket}/o"

    def listing(self, prefix: str, token: str | None, limit: int) -> Request:
        query = {
            "prefix": prefix,
            "delimiter": "/",
            "maxResults": str(limit),
            "fields": f"nextPageToken,prefixes,items({_FIELDS})",
        }
        return Request(path=self._objects, query=query if token is None else {**query, "pageToken": token})

    def listed(self, answer: Answer, prefix: str) -> Page:
        listing = _json(answer)
        items = listing.get("items", ())
        return Page(
            objects=tuple(_generation(item) for item in items if item["name"] != prefix),
            prefixes=tuple(map(_name, listing.get("prefixes", ()))),
            next_token=str(listing["nextPageToken"]) if listing.get("nextPageToken") else None,
            empty=any(item["name"] == prefix for item in items),
        )

    def stat(self, key: str) -> Request:
        return Request(path=self._path(key), query={"fields": _FIELDS})

    def generation(self, answer: Answer, key: str) -> Generation:
        return _generation({**_json(answer), "name": key})

    def get(self, key: str, generation: Generation, offset: int, length: int) -> Request:
        number = content_name(generation.etag)
        if not number.isdecimal():
            raise ObjectNotFoundError(f"{key}: {self.subject}: {number!r} is no generation number")
        return Request(
            path=self._path(key),
            query={"alt": "media", "generation": number},
            # gzip: an object that is stored compressed comes as it is, and not decompressed whole.
            headers={"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "gzip"},
        )

    def content(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("x-goog-generation")

    def version(self, headers: Mapping[str, str]) -> str | None:
        return None  # the generation number is both

    def reason(self, answer: Answer) -> tuple[str, str]:
        try:
            error = json.loads(answer.body)["error"]
            return str(error.get("status") or error["errors"][0]["reason"]), str(error["message"])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return "", answer.body[:200].decode(errors="replace")

    def missing(self, code: str, message: str) -> bool:
        return "bucket does not exist" in message

    def _path(self, key: str) -> str:
        return f"{self._objects}/{quote(key, safe='')}"


def _json(answer: Answer) -> dict[str, Any]:
    document = json.loads(answer.body)
    if not isinstance(document, dict):
        raise TypeError("not an object")
    return document


def _generation(item: Mapping[str, Any]) -> Generation:
    number = str(int(item["generation"]))
    return Generation(
        key=_name(item["name"]),
        etag=etag_of(number, {"crc32c": item.get("crc32c"), "md5": item.get("md5Hash")}),
        size=int(item["size"]),
        modified_ns=moment(_nanoseconds(str(item["timeCreated"]))),
    )


def _name(value: object) -> str:
    """A name from JSON. Raises UnicodeEncodeError for one that JSON can hold, but UTF-8 cannot."""
    name = str(value)
    name.encode()
    return name


def _nanoseconds(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1_000_000) * 1_000
