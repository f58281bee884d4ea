"""Writes objects of a bucket, with conditions and checksums: see `trimsfs.stores.writer`."""

import base64
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from io import BytesIO
from typing import Any, TypeVar

import botocore.exceptions
import trio

from trimsfs.checksums import combine_crc32c, crc32c
from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import (
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.formats.version_records import DIRECTORY
from trimsfs.options import MountOptions
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.stores.http.failures import parsing
from trimsfs.stores.retrying import Retrying
from trimsfs.stores.s3.client import ca_file, make_client
from trimsfs.stores.s3.s3_errors import translated
from trimsfs.stores.writer import Stored, Upload, part_size

T = TypeVar("T")

SHA256 = "trims-sha256"
"""The metadata of an object that holds the SHA-256 of its content: not every store tells a checksum."""
SMALL = 16 << 20
"""Bytes of the largest object that is read whole."""
MOST_DELETED = 1000
"""Keys in one request, as in S3."""
_PASSING = {"InternalError", "ServiceUnavailable", "SlowDown"}
"""Why a store does not delete a key of several now."""
AWAY_AFTER_S = 120.0
"""How long all parts may fail before no other is tried: two attempts in a row may take as long."""
MOST_LONG_ATTEMPTS = 3
"""Attempts of a request that count as answers until they failed: a part takes long on a slow link."""
_BUSY = {"ConditionalRequestConflict", "OperationAborted"}
"""Another conditional write of the key was under way at the same time."""


class S3Writer:
    """Writes below a prefix of a bucket. A body goes with its SHA-256 or CRC32C, and its MD5, which all stores check.

    Without *conditions*, nothing is asked of the store that old ones do not know, and what is there is replaced.
    """

    def __init__(
        self, bucket: str, prefix: str, options: MountOptions, *, max_requests: int, conditions: bool = True
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._conditions = conditions
        self.etags_are_md5s = options.sse_c_key_file is None
        self._limiter = trio.CapacityLimiter(max_requests)
        away = CircuitBreaker(deadline_s=max(options.retry_deadline, AWAY_AFTER_S))
        self._retrying = Retrying(deadline_s=options.retry_deadline, on_failure=None, breaker=away)
        self.client: Any = make_client(options, max_requests, writes=True)

    @property
    def location(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    async def find(self, key: str) -> Stored | None:
        return await self.ask(partial(self._find, key), key)

    async def read(self, key: str) -> tuple[bytes, str] | None:
        return await self.ask(partial(self._read, key), key)

    async def age(self, key: str) -> timedelta | None:
        return await self.ask(partial(self._age, key), key)

    async def list(self, prefix: str) -> AsyncIterator[Stored]:
        async for page in self._pages(prefix):
            for item in page.get("Contents", ()):
                yield Stored(key=item["Key"][len(self._prefix) :], size=item["Size"], etag=_quoted(item["ETag"]))

    async def directories(self, prefix: str) -> AsyncIterator[str]:
        async for page in self._pages(prefix, Delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                yield item["Prefix"][len(self._prefix + prefix) : -1]

    async def _pages(self, prefix: str, **parameters: str) -> AsyncIterator[Any]:
        token: dict[str, str] = {}
        while True:
            request = partial(
                self.client.list_objects_v2, Bucket=self._bucket, Prefix=self._prefix + prefix, **parameters, **token
            )
            page = await self.ask(request, prefix)
            yield page
            if not page["IsTruncated"]:
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def put_if_absent(self, key: str, data: bytes, *, sha256: str | None = None) -> None:
        metadata = {} if sha256 is None else {SHA256: sha256}
        await self._put(key, data, {"Metadata": metadata, **self.if_absent})

    async def put_if_match(self, key: str, data: bytes, etag: str) -> None:
        # Without quotes, as Amazon's own documents have it: Ceph compares them as part of the ETag.
        condition = {"IfMatch": etag.strip('"')} if self._conditions else {}
        try:
            await self._put(key, data, condition)
        except ObjectNotFoundError:
            raise ObjectChangedError(f"{key}: it was deleted") from None

    async def upload(self, key: str, size: int, sha256: str) -> Upload:
        return await self.ask(partial(self._upload, key, size, sha256), key)

    async def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), MOST_DELETED):
            objects = [{"Key": self._prefix + key} for key in keys[start : start + MOST_DELETED]]
            await self.ask(partial(self._delete, objects))

    async def discard_uploads(self, prefix: str) -> None:
        await self.ask(partial(self._discard_uploads, prefix), prefix)

    async def aclose(self) -> None:
        self.client.close()

    async def ask(self, function: Callable[[], T], key: str = "") -> T:
        """Make a request in a thread, again if that may help. An earlier attempt may have succeeded unheard."""

        attempts = 0
        subject = _subject(key)

        def heard() -> float:
            nonlocal attempts
            attempts += 1
            return trio.current_time() if attempts <= MOST_LONG_ATTEMPTS else -math.inf

        async def attempt() -> T:
            return await in_thread(
                partial(
                    translated,
                    partial(_conditional, function, subject),
                    self._bucket,
                    subject,
                    ca_file=ca_file(self.client),
                ),
                limiter=self._limiter,
                abandon_on_cancel=True,
            )

        return await self._retrying.call(f"{subject or self.location}: no answer", attempt, heard=heard)

    @property
    def if_absent(self) -> dict[str, Any]:
        """The condition that there is no object, as a parameter of a request."""
        return {"IfNoneMatch": "*"} if self._conditions else {}

    def _find(self, key: str) -> Stored | None:
        head = self._head(key)
        if head is None:
            return None
        with parsing():
            return Stored(
                key=key,
                size=head["ContentLength"],
                etag=_quoted(head["ETag"]),
                sha256={name.lower(): value for name, value in head["Metadata"].items()}.get(SHA256),
            )

    def _age(self, key: str) -> timedelta | None:
        head = self._head(key)
        with parsing():
            date = head and head["ResponseMetadata"]["HTTPHeaders"].get("date")
            return max(timedelta(0), parsedate_to_datetime(date) - head["LastModified"]) if date else None

    def _head(self, key: str) -> Any:
        """The answer to a HEAD request; None if there is no such object."""
        try:
            return self.client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except botocore.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise

    def _read(self, key: str) -> tuple[bytes, str] | None:
        try:
            answer = self.client.get_object(Bucket=self._bucket, Key=self._prefix + key)
        except self.client.exceptions.NoSuchKey:
            return None
        with answer["Body"] as body:
            data = body.read(SMALL + 1)
        if len(data) > SMALL:
            raise StoreUnavailableError(f"{key}: larger than {SMALL >> 20} MiB: it is not an object of trimsfs")
        with parsing():
            length, etag = answer["ContentLength"], _quoted(answer["ETag"])
        if len(data) < length:
            raise TransientStoreError(f"{key}: the body ended after {len(data)} bytes")
        return data, etag

    async def _put(self, key: str, data: bytes, parameters: Mapping[str, Any]) -> None:
        def put() -> object:
            return self.client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=BytesIO(data),
                ChecksumSHA256=_base64(hashlib.sha256(data).digest()),
                ContentMD5=_base64(_md5(data)),
                **parameters,
            )

        await self.ask(put, key)

    def _upload(self, key: str, size: int, sha256: str) -> "S3Upload":
        """A new upload of a key, or the newest unfinished one, if its parts have the right sizes."""
        whole = self._prefix + key
        target = {"Bucket": self._bucket, "Key": whole}
        uploads = [
            upload
            for page in self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=whole)
            for upload in page.get("Uploads", ())
            if upload["Key"] == whole
        ]
        if uploads:
            newest = max(uploads, key=lambda one: one["Initiated"])["UploadId"]
            return S3Upload(self, {**target, "UploadId": newest}, size, self._parts(whole, newest, size))
        begun = self.client.create_multipart_upload(
            **target, Metadata={SHA256: sha256}, ChecksumAlgorithm="CRC32C", ChecksumType="FULL_OBJECT"
        )
        return S3Upload(self, {**target, "UploadId": begun["UploadId"]}, size, {})

    def _parts(self, key: str, upload: str, size: int) -> dict[int, tuple[str, str]]:
        """The ETags, and CRC32Cs if there are any, of the parts of an upload that are as long as they must be."""
        length = part_size(size)
        pages = self.client.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=key, UploadId=upload)
        return {
            part["PartNumber"] - 1: (_quoted(part["ETag"]), part.get("ChecksumCRC32C", ""))
            for page in pages
            for part in page.get("Parts", ())
            if part["Size"] == min(length, size - (part["PartNumber"] - 1) * length)
        }

    def _delete(self, objects: Sequence[Mapping[str, str]]) -> None:
        answer: Any = self.client.delete_objects(Bucket=self._bucket, Delete={"Objects": list(objects), "Quiet": True})
        for error in answer.get("Errors", ()):
            kind = TransientStoreError if error.get("Code") in _PASSING else StoreUnavailableError
            raise kind(f"{error['Key']}: not deleted: {error.get('Code')}: {error.get('Message')}")

    def _discard_uploads(self, prefix: str) -> None:
        pages = self.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix
        )
        for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
            try:
                self.client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            except self.client.exceptions.NoSuchUpload:
                continue  # it has ended


class S3Upload:
    """A multipart upload. Its parts have CRC32Cs, by which the store knows that of the whole object."""

    def __init__(
        self, writer: S3Writer, target: Mapping[str, str], size: int, there: Mapping[int, tuple[str, str]]
    ) -> None:
        self.part_size = part_size(size)
        self._writer = writer
        self._target = target
        self._size = size
        self._there = there
        """The ETags and CRC32Cs of parts that an earlier upload left."""
        self._parts: dict[int, tuple[str, int]] = {}
        """The ETag and the CRC32C of each part."""

    async def put_part(self, number: int, data: bytes) -> bool:
        def put() -> tuple[str, int, bool]:
            crc, md5 = crc32c(data), _md5(data)
            checksums = {"ChecksumCRC32C": _base64(crc.to_bytes(4)), "ContentMD5": _base64(md5)}
            etag, left = self._there.get(number, ("", ""))
            if etag == f'"{md5.hex()}"' or (not self._writer.etags_are_md5s and left == checksums["ChecksumCRC32C"]):
                return etag, crc, False
            answer = self._writer.client.upload_part(
                **self._target, PartNumber=number + 1, Body=BytesIO(data), **checksums
            )
            return answer["ETag"], crc, True

        etag, crc, sent = await self._writer.ask(put, self._target["Key"])
        self._parts[number] = etag, crc
        return sent

    async def complete(self) -> None:
        whole, parts = 0, []
        for number, (etag, crc) in sorted(self._parts.items()):
            whole = combine_crc32c(whole, crc, min(self.part_size, self._size - number * self.part_size))
            parts.append({"PartNumber": number + 1, "ETag": etag, "ChecksumCRC32C": _base64(crc.to_bytes(4))})
        request: Any = partial(
            self._writer.client.complete_multipart_upload,
            **self._target,
            MultipartUpload={"Parts": parts},
            ChecksumCRC32C=_base64(whole.to_bytes(4)),
            ChecksumType="FULL_OBJECT",
            **self._writer.if_absent,
        )
        try:
            await self._writer.ask(request, self._target["Key"])
        except ObjectChangedError:  # another upload has made the object: nobody pays for the parts of this one
            abort = partial(self._writer.client.abort_multipart_upload, **self._target)
            with suppress(StoreError):
                await self._writer.ask(abort, self._target["Key"])
            raise


def _subject(key: str) -> str:
    """What an error names: of keys that describe versions, which users do not know, the model."""
    return f"/{key}".partition(f"/{DIRECTORY}/")[0].removeprefix("/")


def _conditional(function: Callable[[], T], key: str) -> T:
    """Call *function*, which makes a request. Translates the errors that only writers meet."""
    try:
        return function()
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in _BUSY:
            raise TransientStoreError(f"{key}: {code}") from error
        if code == "NoSuchUpload":
            raise ObjectChangedError(f"{key}: somebody else ended its upload") from error
        if code == "NotImplemented":
            raise ConfigurationError(f"{key}: the store refuses conditions: --single-writer makes none") from error
        raise


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _quoted(etag: str) -> str:
    """An ETag as listings and HEAD tell it: some answers of some stores lack the quotes."""
    return etag if etag.startswith('"') else f'"{etag}"'
