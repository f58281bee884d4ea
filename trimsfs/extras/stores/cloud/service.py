"""What a cloud service must tell: how to ask it for objects, and how to understand its answers. No I/O."""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Protocol

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.cloud.connections import Answer, Request
from trimsfs.stores.base import Page
from trimsfs.stores.digests import Algorithm, Digest
from trimsfs.stores.http.failures import kind_of, one_line
from trimsfs.types import Generation

_DIGESTS: dict[Algorithm, int] = {"crc32c": 4, "md5": 16}
"""The digests that these services tell, the quickest to compute first, and their lengths in bytes."""
_CONTENT = re.compile(r"([^;]+)(?:;([a-z0-9]+)=([A-Za-z0-9+/=]+))?")


class Service(Protocol):
    """A container of objects in some service. Keys are whole. Parsers may raise any error on a malformed answer."""

    product: str
    """The service's name."""
    subject: str
    """What messages call the container, such as ``bucket models``."""
    url: str
    """The container's URL, without a slash at its end."""
    remedy: str
    """What to do about refused or missing credentials."""

    def listing(self, prefix: str, token: str | None, limit: int) -> Request: ...

    def listed(self, answer: Answer, prefix: str) -> Page:
        """A page, with whole keys; ``empty`` says that an object has the name of the directory itself."""

    def stat(self, key: str) -> Request: ...

    def generation(self, answer: Answer, key: str) -> Generation: ...

    def get(self, key: str, generation: Generation, offset: int, length: int) -> Request:
        """A request for a range of this generation and no other."""

    def content(self, headers: Mapping[str, str]) -> str | None:
        """Which content of the object a success to `get` has: a `content_name`; None if the answer does not tell."""

    def version(self, headers: Mapping[str, str]) -> str | None:
        """The version id of that content."""

    def reason(self, answer: Answer) -> tuple[str, str]:
        """The code and the message of an answer that is no success; empty where there is none."""

    def missing(self, code: str, message: str) -> bool:
        """Whether a 404 or 409 means that the container itself does not exist."""


def etag_of(content: str, digests: Mapping[Algorithm, str | None]) -> str:
    """The ETag of a generation: the store's name for the *content*, and the first of its digests, as base64.

    Listings tell the digest, so that a generation carries it along and no further request is needed.
    """
    for algorithm in _DIGESTS:
        encoded = digests.get(algorithm)
        if encoded is not None and _decoded(algorithm, encoded) is not None:
            return f"{content};{algorithm}={encoded}"
    return content


def content_name(etag: str) -> str:
    """The store's name for the content of a generation with this ETag."""
    return etag.partition(";")[0]


def digest_of(etag: str) -> Digest | None:
    """The digest that an ETag has with it."""
    match = _CONTENT.fullmatch(etag)
    for algorithm in _DIGESTS:
        if match is not None and match[2] == algorithm:
            value = _decoded(algorithm, match[3])
            return None if value is None else Digest(algorithm=algorithm, value=value)
    return None


def _decoded(algorithm: Algorithm, encoded: str) -> bytes | None:
    try:
        value = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None
    return value if len(value) == _DIGESTS[algorithm] else None


def error_of(service: Service, answer: Answer, key: str) -> StoreError:
    """What an answer that is no success means; *key* is empty if it is not about an object."""
    subject = f"{key}: {service.subject}" if key else service.subject
    code, message = (one_line(text) for text in service.reason(answer))
    said = ": ".join(filter(None, (code, message))) or f"HTTP status {answer.status}"
    status = answer.status
    kind = ObjectChangedError if status in {412, 416} else kind_of(status)
    if status in {404, 409} and (service.missing(code, message) or (status == 404 and not key)):
        return BucketNotFoundError(f"{service.subject} does not exist: check the spelling")
    if issubclass(kind, TransientStoreError):
        return kind(said)
    if kind is ObjectNotFoundError:
        said = "no such object"
    elif kind is StoreAccessError:
        said += f": {service.remedy}"
    elif kind is StoreUnavailableError:
        said += ": archived: rehydrate it first" if code == "BlobArchived" else ": check --store and --endpoint-url"
    return kind(f"{subject}: {said}")
