"""An S3 bucket, or a prefix of one, as a store. The only home of boto3."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import boto3
import botocore.exceptions
import trio
import urllib3.exceptions
from botocore import UNSIGNED
from botocore.config import Config

from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.options import MountOptions
from trimsfs.stores.base import PAGE_LIMIT, Page
from trimsfs.types import Generation

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

T = TypeVar("T")

METADATA_THREADS = 8
CONNECT_TIMEOUT_S = 3.0
PIECE = 1 << 20
"""Bytes read from a response at a time: progress is looked at after each."""
SLOWEST_RATE = 64 * 1024
"""Bytes a second under which a response counts as stalled."""

_ACCESS_CODES = {
    "401",
    "403",
    "AccessDenied",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
}
_THROTTLE_CODES = {
    "429",
    "503",
    "RequestLimitExceeded",
    "SlowDown",
    "Throttling",
    "TooManyRequests",
}
_CHANGED_CODES = {"412", "416", "InvalidRange", "NoSuchVersion", "PreconditionFailed"}
_NETWORK_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ResponseStreamingError,
    urllib3.exceptions.HTTPError,
    OSError,
)
_TIMEOUTS = (
    botocore.exceptions.ReadTimeoutError,
    urllib3.exceptions.TimeoutError,
    TimeoutError,
)


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
        self._client = _client(options, max_requests + METADATA_THREADS)

    @property
    def identity(self) -> str:
        return f"{self._client.meta.endpoint_url}|s3://{self._bucket}/{self._prefix}"

    async def probe(self) -> None:
        request = partial(self._client.list_objects_v2, Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        await self._call(request, self._metadata)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        if not _encodable(prefix):
            return Page(objects=(), prefixes=(), next_token=None)
        continuation: _Continuation = {} if token is None else {"ContinuationToken": token}
        request = partial(
            self._client.list_objects_v2,
            Bucket=self._bucket,
            Prefix=self._prefix + prefix,
            Delimiter="/",
            MaxKeys=min(limit, PAGE_LIMIT),
            **continuation,
        )
        answer = await self._call(request, self._metadata)
        strip = len(self._prefix)
        return Page(
            objects=tuple(
                Generation(
                    key=item["Key"][strip:],
                    etag=item["ETag"],
                    size=item["Size"],
                    modified_ns=int(item["LastModified"].timestamp() * 1e9),
                )
                for item in answer.get("Contents", ())
                if item["Key"] != self._prefix + prefix
            ),
            prefixes=tuple(item["Prefix"][strip:] for item in answer.get("CommonPrefixes", ())),
            next_token=answer.get("NextContinuationToken") if answer["IsTruncated"] else None,
            empty=any(item["Key"] == self._prefix + prefix for item in answer.get("Contents", ())),
        )

    async def stat(self, key: str) -> Generation:
        if not _encodable(key):
            raise ObjectNotFoundError(f"{key!r}: keys are UTF-8")
        request = partial(self._client.head_object, Bucket=self._bucket, Key=self._prefix + key)
        answer = await self._call(request, self._metadata)
        return Generation(
            key=key,
            etag=answer["ETag"],
            size=answer["ContentLength"],
            modified_ns=int(answer["LastModified"].timestamp() * 1e9),
            version_id=_version(answer.get("VersionId")),
        )

    async def read_into(self, generation: Generation, offset: int, buffer: memoryview) -> str | None:
        return await self._call(partial(self._read, generation, offset, buffer), self._reads)

    async def aclose(self) -> None:
        self._client.close()

    async def _call(self, function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        with_translated_errors = partial(self._translate, function)
        return await trio.to_thread.run_sync(with_translated_errors, limiter=limiter, abandon_on_cancel=True)

    def _read(self, generation: Generation, offset: int, buffer: memoryview) -> str | None:
        last = offset + len(buffer) - 1
        condition: _Condition = {"IfMatch": generation.etag}
        if generation.version_id is not None:
            condition["VersionId"] = generation.version_id
        answer = self._client.get_object(
            Bucket=self._bucket,
            Key=self._prefix + generation.key,
            Range=f"bytes={offset}-{last}",
            **condition,
        )
        with answer["Body"] as body:
            if answer["ETag"] != generation.etag:
                raise ObjectChangedError(f"{generation.key}: its ETag is now {answer['ETag']}")
            expected = f"bytes {offset}-{last}/{generation.size}"
            if answer.get("ContentRange") != expected:
                raise TransientStoreError(f"asked for {expected}, was sent {answer.get('ContentRange')}")
            self._receive(body, buffer)
        return _version(answer.get("VersionId"))

    def _receive(self, body: Any, buffer: memoryview) -> None:
        done = mark = 0
        marked = time.monotonic()
        while done < len(buffer):
            count = body.readinto(buffer[done : done + PIECE])
            if count == 0:
                raise TransientStoreError(f"the body ended after {done} of {len(buffer)} bytes")
            done += count
            elapsed = time.monotonic() - marked
            if elapsed > self._stall_timeout_s:
                if done - mark < elapsed * SLOWEST_RATE:
                    raise StoreStalledError(f"only {done - mark} bytes in {elapsed:.0f} s")
                mark, marked = done, time.monotonic()

    def _translate(self, function: Callable[[], T]) -> T:
        """Call *function*; what the SDK raises becomes one of trimsfs's own errors."""
        try:
            return function()
        except botocore.exceptions.ClientError as error:
            raise self._client_error(error) from error
        except _TIMEOUTS as error:
            raise StoreStalledError(f"no answer in time: {error}") from error
        except _NETWORK_ERRORS as error:
            raise TransientStoreError(str(error)) from error
        except (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.CredentialRetrievalError,
            botocore.exceptions.TokenRetrievalError,
            botocore.exceptions.SSOError,
        ) as error:
            raise StoreAccessError(
                f"bucket {self._bucket}: {error}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or --profile, or --anonymous"
            ) from error
        except botocore.exceptions.ParamValidationError as error:
            raise BucketNotFoundError(f"bucket {self._bucket}: {error}".replace("\n", " ")) from error
        except botocore.exceptions.BotoCoreError as error:
            raise StoreUnavailableError(f"bucket {self._bucket}: {error}") from error

    def _client_error(self, error: botocore.exceptions.ClientError) -> StoreError:
        answer: Any = error.response
        code = str(answer.get("Error", {}).get("Code", ""))
        message = str(answer.get("Error", {}).get("Message", "")) or code
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            return BucketNotFoundError(f"bucket {self._bucket} does not exist")
        if code in {"PermanentRedirect", "301"}:
            region = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
            return StoreAccessError(f"bucket {self._bucket} is in region {region}: set --region")
        if code in {"404", "NoSuchKey"}:
            return ObjectNotFoundError(f"bucket {self._bucket}: no such object")
        if code in _CHANGED_CODES:
            return ObjectChangedError(f"bucket {self._bucket}: {message}")
        if code in _ACCESS_CODES or status in {401, 403}:
            return StoreAccessError(f"bucket {self._bucket}: {code}: {message}: check the credentials")
        if code in _THROTTLE_CODES or status in {429, 503}:
            return StoreThrottledError(f"{code}: {message}")
        if status >= 500 or code in {"RequestTimeout", "InternalError"}:
            return TransientStoreError(f"{code}: {message}")
        return StoreUnavailableError(f"bucket {self._bucket}: {code}: {message}")


def _client(options: MountOptions, connections: int) -> "S3Client":
    """A client for the options. Raises ConfigurationError for what the SDK cannot use."""
    config = Config(
        signature_version=UNSIGNED if options.anonymous else None,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=options.stall_timeout,
        max_pool_connections=connections,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": options.addressing_style},
        tcp_keepalive=True,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.Session(profile_name=options.profile, region_name=options.region)
        if session.region_name is None and options.endpoint_url is not None:
            # A server other than AWS seldom cares, but a signature needs some region.
            session = boto3.Session(profile_name=options.profile, region_name="us-east-1")
        return session.client("s3", endpoint_url=options.endpoint_url, config=config)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigurationError(f"S3: {error}") from error


def _encodable(key: str) -> bool:
    """Whether a name can be a key at all; names from the kernel are any bytes, undecodable ones as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in key)


def _version(value: str | None) -> str | None:
    return None if value in {None, "null"} else value
