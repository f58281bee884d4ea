"""Translates the SDK's errors into trimsfs's own."""

import os
import pwd
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import botocore.exceptions
import botocore.parsers
import urllib3.exceptions

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreNotTrustedError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
    StoreUnclearError,
    TransientStoreError,
)
from trimsfs.stores.http.failures import CLOCK_REMEDY, MalformedAnswerError, clock_remedy, one_line, parsing
from trimsfs.stores.s3.aws_credentials import TOKEN_FILE

T = TypeVar("T")

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
_REMEDIES = {
    "AccessDenied": "check the credentials, and what their policy allows",
    "ExpiredToken": "renew the credentials",
    "InvalidAccessKeyId": "the store does not know the key: check AWS_ACCESS_KEY_ID or the profile",
    "InvalidToken": "renew the credentials",
    "SignatureDoesNotMatch": "check the secret: AWS_SECRET_ACCESS_KEY or the profile",
}
"""What to do about refusals, by their codes."""
_THROTTLE_CODES = {"429", "503", "RequestLimitExceeded", "SlowDown", "Throttling", "TooManyRequests"}
_CHANGED_CODES = {"412", "416", "InvalidRange", "NoSuchVersion", "PreconditionFailed"}
_PASSING_CODES = {"307", "408", "InternalError", "RequestTimeout", "TemporaryRedirect"}
"""Codes of transient failures. An answer to HEAD has no code but its status: 400 may mean RequestTimeout or
ExpiredToken."""
_NETWORK_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ResponseStreamingError,
    urllib3.exceptions.HTTPError,
    OSError,
)
_TIMEOUTS = (botocore.exceptions.ReadTimeoutError, urllib3.exceptions.TimeoutError, TimeoutError)
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.SSOError,
)
_OBJECT = re.compile(r"(?:(https?://[^/\s\"']+)|(?<=with url: ))/[^\s\"']*")
"""What of a URL tells the object that was asked for: the circuit breaker tells of the failure where others are."""


def translated(function: Callable[[], T], bucket: str, key: str = "", *, ca_file: str = "") -> T:
    """Call *function*, which makes a request about a bucket or an object. Raises StoreErrors of one line.

    *ca_file* has the authorities that the store's certificate is verified by.
    No message shows what the SDK would send, as that contains credentials.
    """
    subject = f"{key}: bucket {bucket}" if key else f"bucket {bucket}"
    try:
        return function()
    except StoreError:
        raise
    except botocore.exceptions.SSLError as error:
        raise _tls_error(error, ca_file) from error
    except (botocore.exceptions.BotoCoreError, *_NETWORK_ERRORS, MalformedAnswerError) as error:
        if "header value" in str(error):
            # Without the cause: its text is the header, which contains the access key or the token.
            message = f"{subject}: the credentials contain a character that cannot be sent: check them"
            raise StoreAccessError(message) from None
        raise _sdk_error(error, subject) from error
    except botocore.exceptions.ClientError as error:
        raise _client_error(error, bucket, subject) from error


@contextmanager
def by_sdk() -> Iterator[None]:
    """A block in which the SDK parses an answer, or that of a service for credentials. Raises as `parsing` does."""
    with parsing(botocore.parsers.ResponseParserError, RuntimeError):  # the last from invalid times
        yield


def _tls_error(error: botocore.exceptions.SSLError, ca_file: str) -> TransientStoreError:
    """Why a connection by TLS failed; if by the file of authorities, with the remedy."""
    said = _OBJECT.sub(r"\1", one_line(error))
    _, untrusted, why = said.partition("certificate verify failed: ")
    if untrusted:
        host, reason = urlsplit(str(error.kwargs["endpoint_url"])).hostname, why.partition(" (_ssl.c")[0]
        if (by_clock := clock_remedy(reason)) is not None:
            return StoreNotTrustedError(f"the certificate of {host}: {reason}: {by_clock}")
        return StoreNotTrustedError(
            f"the certificate of {host} is not trusted by the CA file {ca_file}: {reason}: set AWS_CA_BUNDLE, or "
            "ca_bundle in the AWS configuration, to a file with the CA that has signed it"
        )
    if "NO_CERTIFICATE_OR_CRL_FOUND" in said:
        return StoreNotTrustedError(
            f"CA file {ca_file}: has no certificate in PEM: correct the path in AWS_CA_BUNDLE or ca_bundle"
        )
    _, unusable, why = said.partition(" [Errno ")
    if unusable:
        return StoreNotTrustedError(
            f"CA file {ca_file}: {why.partition('] ')[2]}: user {_user()} must be able to read it: check the path in "
            "AWS_CA_BUNDLE or ca_bundle, and the modes of the file and of the directories above it"
        )
    return TransientStoreError(said)


def _user() -> str:
    """The name of the user that this process runs as."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _sdk_error(error: Exception, subject: str) -> StoreError:
    """What went wrong on this side of the connection, or with it."""
    said = _OBJECT.sub(r"\1", one_line(error))
    if isinstance(error, _TIMEOUTS):
        return StoreStalledError(f"timeout: {said}")
    if isinstance(error, _NETWORK_ERRORS):
        return TransientStoreError(said)
    if isinstance(error, _NO_CREDENTIALS):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or --profile; to read a public bucket, --anonymous"
        if TOKEN_FILE in said:
            remedy = "put the token there, for the server's user to read"
        return StoreAccessError(f"{subject}: {said}: {remedy}")
    if isinstance(error.__cause__, RuntimeError) and "credentials" in said:
        return StoreAccessError(f"{subject}: {said}: renew the credentials")
    if isinstance(error, botocore.exceptions.ParamValidationError):
        return BucketNotFoundError(f"{subject}: {said}")
    if isinstance(error, botocore.exceptions.BotoCoreError):
        return StoreUnavailableError(f"{subject}: {said}")
    return StoreUnavailableError(f"{subject}: the answer is not from S3: check the endpoint")


def _client_error(error: botocore.exceptions.ClientError, bucket: str, subject: str) -> StoreError:
    answer: Any = error.response
    code = one_line(answer.get("Error", {}).get("Code") or "")
    message = one_line(answer.get("Error", {}).get("Message") or "")
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = ": ".join(filter(None, (code, message))) or f"HTTP status {status}"
    if code == "NoSuchBucket":
        return BucketNotFoundError(f"bucket {bucket} does not exist: check the spelling")
    if code in {"PermanentRedirect", "301"}:
        region = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return StoreAccessError(f"bucket {bucket} is in region {region}: set --region")
    if error.operation_name.startswith("AssumeRole") and status < 500 and code not in _THROTTLE_CODES:
        return StoreAccessError(f"{subject}: {said}: check the role and what it trusts")
    if code in {"404", "NoSuchKey"}:
        return ObjectNotFoundError(f"{subject}: no such object")
    if code in _CHANGED_CODES:
        return ObjectChangedError(f"{subject}: {said}")
    if code == "InvalidObjectState":
        return StoreUnavailableError(f"{subject}: {said}: archived: restore it first")
    if code in _ACCESS_CODES or status in {401, 403}:
        return StoreAccessError(f"{subject}: {error.operation_name}: {_refusal(code, said, answer)}")
    if code in _THROTTLE_CODES or status in {429, 503}:
        return StoreThrottledError(said)
    if code == "400":
        return StoreUnclearError(said)
    if status >= 500 or code in _PASSING_CODES:
        return TransientStoreError(said)
    return StoreUnavailableError(f"{subject}: {said}")


def _refusal(code: str, said: str, answer: Any) -> str:
    """What the store refuses, of which key, and the remedy."""
    if code == "RequestTimeTooSkewed":
        return f"{said}: {_clock(answer['ResponseMetadata'].get('HTTPHeaders', {}).get('date'))}"
    key = answer.get("Error", {}).get("AWSAccessKeyId")
    remedy = _REMEDIES.get(code, "check the credentials")
    return f"{said}: of key {one_line(key)}: {remedy}" if key else f"{said}: {remedy}"


def _clock(date: str | None) -> str:
    """How far the clock of this host is off, by the time of an answer, and the remedy."""
    try:
        ahead_s = time.time() - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return f"the clock of this host and the store's differ: {CLOCK_REMEDY}"
    return f"the clock of this host is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}: {CLOCK_REMEDY}"
