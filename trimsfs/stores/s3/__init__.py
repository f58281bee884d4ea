"""The S3 store: a bucket, or a prefix of one; the only home of boto3."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, TypedDict, TypeVar

import botocore.exceptions
import trio

from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, StoreError, TransientStoreError
from trimsfs.options import MountOptions
from trimsfs.stores.base import PAGE_LIMIT, Head, Page, Sink, moment
from trimsfs.stores.digests import Digest
from trimsfs.stores.http.bodies import METADATA_THREADS, RequestThreads, check_range, received
from trimsfs.stores.http.failures import parsing
from trimsfs.stores.http.receive_loop import HttpBody
from trimsfs.stores.s3.answers import Transport
from trimsfs.stores.s3.client import ca_file, make_client
from trimsfs.stores.s3.object_digests import digest_by_etag, digest_of
from trimsfs.stores.s3.requests import Condition, ObjectRequests
from trimsfs.stores.s3.s3_errors import by_sdk, translated
from trimsfs.stores.s3.timestamps import parsed
from trimsfs.types import Generation

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

T = TypeVar("T")

KEY_MAX = 1024
"""Bytes in the longest key that S3 allows."""
VERSION_MAX = 1024
"""Characters in the longest version id that S3 allows."""
SMALL = 8 << 20
"""Bytes up to which an ETag that looks like a digest is compared without a request that tells whether it is one."""


_DIRECTORY_BUCKETS = ("--x-s3", "--xa-s3")
"""How the names of S3 Express's directory buckets, and of access points to them, end: their ETags are no digests."""


class _Continuation(TypedDict, total=False):
    ContinuationToken: str


class S3Store:
    """The objects of a bucket under a prefix, with credentials from the SDK's own chain.

    Every read has If-Match, and VersionId once it is known, so that the bytes of two generations never mix.
    Requests are tried once: RetryingStore retries them.
    """

    streaming = True  # the answer to If-Match comes before the bytes
    forkable = True
    links = False

    def __init__(self, bucket: str, prefix: str, options: MountOptions, *, max_requests: int) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._stall_timeout_s = options.stall_timeout
        self._connected = False
        self._etags = options.sse_c_key_file is None and not bucket.endswith(_DIRECTORY_BUCKETS)
        self._threads = RequestThreads(
            f"bucket {bucket}", self._translated, max_requests=max_requests, stall_timeout_s=options.stall_timeout
        )
        self._client = make_client(options, max_requests + METADATA_THREADS)
        self.ca_file = ca_file(self._client)
        transport = Transport(self._client, 2 * options.stall_timeout)
        self._objects = ObjectRequests(self._client, transport, bucket)

    @property
    def identity(self) -> str:
        return f"{self._client.meta.endpoint_url}|s3://{self._bucket}/{self._prefix}"

    async def probe(self) -> None:
        failed = list[StoreError]()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._connect)
            try:
                await self._threads.ask(partial(self._list, "", None, 1))
            except StoreError as error:
                failed.append(error)
            nursery.cancel_scope.cancel()
        if failed:
            raise failed[0]
        with suppress(StoreError):  # then the first read learns it
            await self._threads.ask(self._objects.learn)

    async def _connect(self) -> None:
        """Open another connection, once: the first program has a name listed and the first bytes fetched at once."""
        if self._connected:
            return
        self._connected = True
        with suppress(StoreError):
            await self._threads.ask(partial(self._client.head_bucket, Bucket=self._bucket))

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        if not _possible(self._prefix + prefix):
            return Page(objects=(), prefixes=(), next_token=None)
        return await self._threads.ask(partial(self._list, prefix, token, limit), prefix)

    async def stat(self, key: str) -> Generation:
        if not _possible(self._prefix + key):
            raise ObjectNotFoundError(f"{key!r} is not a valid key")
        return await self._threads.ask(partial(self._head, key), key)

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        get = partial(self._get, generation, offset, length)
        return await self._threads.read(get, length, sink, generation.key)

    async def peek(self, key: str, length: int) -> Head:
        if not _possible(self._prefix + key):
            raise ObjectNotFoundError(f"{key!r} is not a valid key")
        return await self._threads.ask(partial(self._peek, key, length), key)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        likely = None if certain or not self._etags else digest_by_etag(generation.etag)
        if likely is not None and not likely.parts and generation.size <= SMALL:
            return likely  # without a request
        digest = await self._threads.ask(partial(self._digest, generation), generation.key)
        return None if certain and digest is not None and not digest.certain else digest

    async def aclose(self) -> None:
        self._client.close()

    def _translated(self, function: Callable[[], T], key: str) -> T:
        return translated(function, self._bucket, key, ca_file=self.ca_file)

    def _list(self, prefix: str, token: str | None, limit: int) -> Page:
        continuation: _Continuation = {} if token is None else {"ContinuationToken": token}
        answer = self._client.list_objects_v2(
            Bucket=self._bucket,
            Prefix=self._prefix + prefix,
            Delimiter="/",
            MaxKeys=min(limit, PAGE_LIMIT),
            **continuation,
        )
        with by_sdk():
            return self._page(self._prefix + prefix, answer)

    def _page(self, whole: str, answer: "ListObjectsV2OutputTypeDef") -> Page:
        """The page that the SDK has parsed; *whole* is the prefix that it lists."""
        strip = len(self._prefix)
        contents, common = answer.get("Contents", ()), answer.get("CommonPrefixes", ())
        if len(contents) + len(common) < answer.get("KeyCount", 0):
            raise TransientStoreError(f"the listing has fewer names than its count says, {answer['KeyCount']}")
        if answer["IsTruncated"] and not answer.get("NextContinuationToken"):
            raise TransientStoreError("the listing is truncated, without a continuation token")
        return Page(
            objects=tuple(
                Generation(
                    key=item["Key"][strip:],
                    etag=item["ETag"],
                    size=item["Size"],
                    modified_ns=_seconds(item["LastModified"]),
                )
                for item in contents
                if item["Key"] != whole
            ),
            prefixes=tuple(item["Prefix"][strip:] for item in common),
            next_token=answer["NextContinuationToken"] if answer["IsTruncated"] else None,
            # A bucket exists even if it is empty; a directory exists if an object has its name.
            empty=not whole or any(item["Key"] == whole for item in contents),
        )

    def _head(self, key: str) -> Generation:
        headers = self._objects.head(self._prefix + key).headers
        with by_sdk():
            return Generation(
                key=key,
                etag=headers["etag"],
                size=int(headers["content-length"]),
                modified_ns=_seconds(parsed(headers["last-modified"])),
                version_id=_version(headers.get("x-amz-version-id")),
            )

    def _digest(self, generation: Generation) -> Digest | None:
        head = partial(self._objects.head, self._prefix + generation.key, **_condition(generation))
        headers = head(ChecksumMode="ENABLED").headers
        with parsing():
            digest = digest_of(headers, etags=self._etags)
        if digest is None or not digest.parts:
            return digest
        try:
            headers = head(PartNumber=1).headers
        except botocore.exceptions.ClientError:
            return digest  # this server does not support PartNumber
        with parsing():
            first = int(headers["content-length"])
        fits = first > 0 and -(-generation.size // first) == digest.parts
        return replace(digest, part_size=first) if fits else digest

    def _get(self, generation: Generation, offset: int, length: int) -> tuple[HttpBody, str | None]:
        """The body and version id of an answer, once its headers match the request."""
        last = offset + length - 1
        answer = self._objects.get(
            self._prefix + generation.key, Range=f"bytes={offset}-{last}", **_condition(generation)
        )
        headers, body = answer.headers, answer.body
        try:
            check_range(headers, offset, length, generation.size)
            etag = headers.get("etag")
            if etag is None:
                raise TransientStoreError(f"{generation.key}: got no ETag")
            if etag != generation.etag:
                raise ObjectChangedError(f"{generation.key}: its ETag is now {etag}")
            with parsing():
                return HttpBody(body), _version(headers.get("x-amz-version-id"))
        except BaseException:
            body.close()
            raise

    def _peek(self, key: str, length: int) -> Head:
        answer = self._objects.get(self._prefix + key, Range=f"bytes=0-{length - 1}")
        data, headers = received(answer.body, self._stall_timeout_s, limit=length), answer.headers
        with parsing():
            size = int(headers.get("content-range", "").rpartition("/")[2])
        check_range(headers, 0, min(length, size), size)
        if len(data) != min(length, size):
            raise TransientStoreError(f"{key}: got {len(data)} of {min(length, size)} bytes")
        return Head(headers.get("etag"), size, data)


def _condition(generation: Generation) -> Condition:
    """The condition that the object still has this generation."""
    condition: Condition = {"IfMatch": generation.etag}
    if generation.version_id is not None:
        condition["VersionId"] = generation.version_id
    return condition


def _possible(key: str) -> bool:
    """Whether a name can be a key. Names from the kernel are any bytes, with undecodable ones as surrogates."""
    try:
        return len(key.encode()) <= KEY_MAX
    except UnicodeEncodeError:
        return False


def _seconds(modified: datetime) -> int:
    """A time in nanoseconds, cut to whole seconds: some servers' listings are more precise than their HEAD answers."""
    return moment(int(modified.timestamp()) * 1_000_000_000)


def _version(value: str | None) -> str | None:
    if value is None or value == "null":
        return None
    if len(value) > VERSION_MAX or not value.isprintable():
        raise ValueError("invalid version id")
    return value
