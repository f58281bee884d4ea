"""An S3 bucket, or a prefix of one, as a store. The only home of boto3."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from functools import partial
from typing import Any, TypedDict, TypeVar

import trio

from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreStalledError, TransientStoreError
from trimsfs.options import MountOptions
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, moment
from trimsfs.stores.s3.client import CONNECT_TIMEOUT_S, make_client
from trimsfs.stores.s3.errors import translated
from trimsfs.types import Generation

T = TypeVar("T")

METADATA_THREADS = 8
KEY_MAX = 1024
"""Bytes in the longest key that S3 knows."""
VERSION_MAX = 1024
"""Characters in the longest version id that S3 knows."""
PIECE = 1 << 18
"""Most bytes read from a response at a time: progress is looked at after each."""
SLOWEST_RATE = 64 * 1024
"""Bytes a second under which a response counts as stalled."""


class _Condition(TypedDict, total=False):
    IfMatch: str
    VersionId: str


class _Continuation(TypedDict, total=False):
    ContinuationToken: str


class S3Store:
    """The objects of a bucket under a prefix, by the SDK's own chain of credentials.

    Every read carries If-Match, and VersionId once the bucket has shown one, so that bytes of two contents of a
    key never mix. Requests are tried once: retries are RetryingStore's.
    """

    def __init__(self, bucket: str, prefix: str, options: MountOptions, *, max_requests: int) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._stall_timeout_s = options.stall_timeout
        self._reads = trio.CapacityLimiter(max_requests)
        self._metadata = trio.CapacityLimiter(METADATA_THREADS)
        self._client = make_client(options, max_requests + METADATA_THREADS)

    @property
    def identity(self) -> str:
        return f"{self._client.meta.endpoint_url}|s3://{self._bucket}/{self._prefix}"

    @property
    def streaming(self) -> bool:
        return True  # the answer to If-Match comes before the bytes

    @property
    def forkable(self) -> bool:
        return True

    async def probe(self) -> None:
        await self._ask(partial(self._list, "", None, 1))

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        if not _possible(self._prefix + prefix):
            return Page(objects=(), prefixes=(), next_token=None)
        return await self._ask(partial(self._list, prefix, token, limit), prefix)

    async def stat(self, key: str) -> Generation:
        if not _possible(self._prefix + key):
            raise ObjectNotFoundError(f"{key!r} cannot be a key")
        return await self._ask(partial(self._head, key), key)

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        # While the head of an answer drips in, no piece of a body is late.
        timeout_s = CONNECT_TIMEOUT_S + 2 * self._stall_timeout_s

        def begins() -> bool:
            scope.deadline = math.inf
            return not scope.cancel_called

        read = partial(self._read, generation, offset, length, sink, partial(trio.from_thread.run_sync, begins))
        with trio.move_on_after(timeout_s) as scope:
            return await trio.to_thread.run_sync(
                partial(translated, read, self._bucket, generation.key), limiter=self._reads, abandon_on_cancel=True
            )
        raise StoreStalledError(f"{generation.key}: no answer in {timeout_s:g} s")

    async def aclose(self) -> None:
        self._client.close()

    async def _ask(self, function: Callable[[], T], key: str = "") -> T:
        """A small request, in a thread: given up, if not ended, when it takes much longer than a stall."""
        timeout_s = 2 * self._stall_timeout_s
        try:
            with trio.fail_after(timeout_s):
                return await trio.to_thread.run_sync(
                    partial(translated, function, self._bucket, key), limiter=self._metadata, abandon_on_cancel=True
                )
        except trio.TooSlowError:
            raise StoreStalledError(f"bucket {self._bucket}: no whole answer in {timeout_s:g} s") from None

    def _list(self, prefix: str, token: str | None, limit: int) -> Page:
        continuation: _Continuation = {} if token is None else {"ContinuationToken": token}
        answer = self._client.list_objects_v2(
            Bucket=self._bucket,
            Prefix=self._prefix + prefix,
            Delimiter="/",
            MaxKeys=min(limit, PAGE_LIMIT),
            **continuation,
        )
        strip = len(self._prefix)
        contents = answer.get("Contents", ())
        return Page(
            objects=tuple(
                Generation(
                    key=item["Key"][strip:],
                    etag=item["ETag"],
                    size=item["Size"],
                    modified_ns=_seconds(item["LastModified"]),
                )
                for item in contents
                if item["Key"] != self._prefix + prefix
            ),
            prefixes=tuple(item["Prefix"][strip:] for item in answer.get("CommonPrefixes", ())),
            next_token=answer["NextContinuationToken"] if answer["IsTruncated"] else None,
            empty=any(item["Key"] == self._prefix + prefix for item in contents),
        )

    def _head(self, key: str) -> Generation:
        answer = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        return Generation(
            key=key,
            etag=answer["ETag"],
            size=answer["ContentLength"],
            modified_ns=_seconds(answer["LastModified"]),
            version_id=_version(answer.get("VersionId")),
        )

    def _read(
        self, generation: Generation, offset: int, length: int, sink: Sink, begins: Callable[[], bool]
    ) -> str | None:
        """Read a range; *begins* hears when there is an answer, and tells whether somebody still wants it."""
        last = offset + length - 1
        condition: _Condition = {"IfMatch": generation.etag}
        if generation.version_id is not None:
            condition["VersionId"] = generation.version_id
        answer = self._client.get_object(
            Bucket=self._bucket,
            Key=self._prefix + generation.key,
            Range=f"bytes={offset}-{last}",
            **condition,
        )
        body: Any = answer["Body"]
        with closing(body):
            if not begins():
                raise StoreStalledError("too late")
            expected, sent = f"bytes {offset}-{last}/{generation.size}", answer.get("ContentRange")
            if sent != expected:
                raise TransientStoreError(f"asked for {expected}, was sent {sent or 'no range'}")
            etag = answer.get("ETag")
            if etag is None:
                raise TransientStoreError(f"{generation.key}: was sent no ETag")
            if etag != generation.etag:
                raise ObjectChangedError(f"{generation.key}: its ETag is now {etag}")
            # The SDK's own stream has no read1(); urllib3's below it has.
            self._receive(body._raw_stream, length, sink)
        return _version(answer.get("VersionId"))

    def _receive(self, body: Any, length: int, sink: Sink) -> None:
        done = mark = 0
        marked = time.monotonic()
        while done < length:
            # One piece as it comes: a read that fills its buffer cannot be told from a stall while bytes drip in.
            piece = body.read1(min(PIECE, length - done))
            if not piece:
                raise TransientStoreError(f"the body ended after {done} of {length} bytes")
            sink(piece)
            done += len(piece)
            elapsed = time.monotonic() - marked
            if elapsed > self._stall_timeout_s and done < length:
                if done - mark < elapsed * SLOWEST_RATE:
                    raise StoreStalledError(f"only {done - mark} bytes in {elapsed:.0f} s")
                mark, marked = done, time.monotonic()


def _possible(key: str) -> bool:
    """Whether a name can be a key at all; names from the kernel are any bytes, undecodable ones as surrogates."""
    try:
        return len(key.encode()) <= KEY_MAX
    except UnicodeEncodeError:
        return False


def _seconds(modified: datetime) -> int:
    """A time in nanoseconds, but of whole seconds: some servers tell more in listings than of an object."""
    return moment(int(modified.timestamp()) * 1_000_000_000)


def _version(value: str | None) -> str | None:
    if value is None or value == "null":
        return None
    if len(value) > VERSION_MAX or not value.isprintable():
        raise ValueError("a version id that is none")
    return value
