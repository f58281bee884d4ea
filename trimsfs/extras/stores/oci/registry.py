"""Requests to a registry, by the OCI distribution specification: manifests, and ranges of blobs."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3
from cachetools import TTLCache
from urllib3.util.ssl_ import create_urllib3_context

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.oci.authorisation import Authorisation
from trimsfs.extras.stores.oci.reference import Reference
from trimsfs.options import MountOptions
from trimsfs.stores.bodies import CONNECT_TIMEOUT_S, MALFORMED, MalformedAnswerError, parsing, received
from trimsfs.stores.endpoints import UNANSWERED, Pools, unanswered

T = TypeVar("T")

MOST_REDIRECTS = 5
LOCATION_TTL_S = 60.0
"""How long a blob's place, to which the registry has redirected, is asked without asking the registry: signed URLs
live for minutes."""
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_REDIRECTS = {301, 302, 303, 307, 308}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CONNECTION = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>: |^HTTPS?Connection\([^)]*\): ")
_REMEDIES = {
    "WRONG_VERSION_NUMBER": "set plain_http if the registry has no TLS",
    "CERTIFICATE_VERIFY_FAILED": "set SSL_CERT_FILE to its authorities, if you trust them",
}
_TEXT_LIMIT = 300


class Registry:
    """A repository of a registry, to be asked from any thread. Each request is tried once.

    Methods raise BucketNotFoundError if the artifact does not exist, and else only the StoreErrors of `Store`.
    """

    def __init__(self, reference: Reference, options: MountOptions, *, connections: int) -> None:
        plain = reference.local if options.plain_http is None else options.plain_http
        self._reference = reference
        self._base = f"{'http' if plain else 'https'}://{reference.host}/v2/{reference.path}"
        self._timeout_s = 2 * options.stall_timeout
        self._pools = Pools(
            maxsize=connections,
            retries=False,
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=options.stall_timeout),
            ssl_context=None if plain else _tls(),
        )
        self._authorisation = Authorisation(reference, self._exchange, options)
        self._locations: TTLCache[str, str] = TTLCache(256, LOCATION_TTL_S)
        self._locations_lock = threading.Lock()

    def resolve(self) -> str:
        """The digest of the manifest that the reference names now."""
        response = self._ask("HEAD", f"manifests/{self._reference.reference}", {"Accept": ", ".join(MANIFEST_TYPES)})
        received(response, self._timeout_s)
        digest = response.headers.get("Docker-Content-Digest", "")
        return digest if _DIGEST.fullmatch(digest) else digest_of(self.manifest(self._reference.reference))

    def manifest(self, reference: str) -> bytes:
        """The manifest of a tag or digest; of a digest, it has been compared."""
        response = self._ask("GET", f"manifests/{reference}", {"Accept": ", ".join(MANIFEST_TYPES)})
        content = received(response, self._timeout_s)
        if ":" in reference and digest_of(content) != reference:
            raise TransientStoreError(f"{self._reference}: manifest {reference} has other bytes")
        return content

    def blob(self, digest: str, offset: int, length: int) -> Any:
        """The body, urllib3's stream, of *length* bytes of a blob. Raises ObjectNotFoundError."""
        last = offset + length - 1
        headers = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        response = self._relocated(digest, headers) or self._send("GET", f"blobs/{digest}", headers, blob=digest)
        try:
            told = response.headers.get("Content-Range", "")
            whole = response.status == 200 and offset == 0 and response.headers.get("Content-Length") == str(length)
            if not whole and not told.startswith(f"bytes {offset}-{last}/"):
                raise StoreUnavailableError(
                    f"{self._reference}: the registry serves no ranges of layers: asked for bytes {offset}-{last}, "
                    f"got {told or f'status {response.status}'}"
                )
        except BaseException:
            response.close()
            self.forget(digest)
            raise
        return response

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """A short range of a blob. Raises ObjectNotFoundError."""
        content = received(self.blob(digest, offset, length), self._timeout_s)
        if len(content) != length:
            raise TransientStoreError(f"asked for {length} bytes, got {len(content)}")
        return content

    def close(self) -> None:
        """Close the connections."""
        self._pools.clear()

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> Any:
        """The answer to a request about the artifact itself."""
        try:
            return self._send(method, path, headers)
        except ObjectNotFoundError:
            raise BucketNotFoundError(f"artifact {self._reference} does not exist: check the spelling") from None

    def _relocated(self, digest: str, headers: Mapping[str, str]) -> Any:
        """The answer of the place to which the registry has sent for this blob lately; None if that serves no more."""
        with self._locations_lock:
            url = self._locations.get(digest)
        if url is None:
            return None
        try:
            response = self._exchange("GET", url, headers)
            if response.status < 300:
                return response
            received(response, self._timeout_s)
        except BaseException:
            self.forget(digest)  # the registry may send the next attempt to another place
            raise
        self.forget(digest)
        return None

    def forget(self, digest: str) -> None:
        """Ask the registry where to read a blob when it is read next."""
        with self._locations_lock:
            self._locations.pop(digest, None)

    def _send(self, method: str, path: str, headers: Mapping[str, str], *, blob: str = "") -> Any:
        """The answer to a request, authorised and redirected as the registry asks for, once it is a success."""
        url = f"{self._base}/{path}"
        authorisation = self._authorisation.header
        response, own = self._follow(method, url, headers, authorisation, blob)
        if response.status == 401 and own:  # the storage behind a redirect asks for no credentials of the registry
            challenge = response.headers.get("WWW-Authenticate", "")
            received(response, self._timeout_s)
            renewed = self._authorisation.renew(challenge, authorisation)
            response, own = self._follow(method, url, headers, renewed, blob)
        if response.status >= 300:
            raise self._error(response.status, received(response, self._timeout_s), own=own)
        return response

    def _follow(
        self, method: str, url: str, headers: Mapping[str, str], authorisation: str, blob: str
    ) -> tuple[Any, bool]:
        """The answer at the end of redirects, and whether the registry itself gave it. Only that gets the
        authorisation."""
        first = urlsplit(url)
        for number in range(MOST_REDIRECTS + 1):
            own = urlsplit(url)[:2] == first[:2]
            response = self._exchange(method, url, {**headers, **_authorised(authorisation if own else "")})
            if response.status not in _REDIRECTS:
                if number and blob and not own and response.status < 300:
                    with self._locations_lock:
                        self._locations[blob] = url
                return response, own
            received(response, self._timeout_s)
            with parsing():
                url = urljoin(url, response.headers.get("Location", ""))
                scheme = urlsplit(url).scheme
            if scheme not in {first.scheme, "https"}:
                raise StoreUnavailableError(f"{self._reference}: the registry redirects to {_shown(url)}, without TLS")
        raise StoreUnavailableError(f"{self._reference}: more than {MOST_REDIRECTS} redirects")

    def _exchange(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> Any:
        """The answer to one request, its body unread."""
        with parsing():
            pool = self._pools.of(url)
            return pool.request(method, url, headers=headers, body=body, redirect=False, preload_content=False)

    def _error(self, status: int, body: bytes, *, own: bool) -> StoreError:
        said = _said(body) or f"HTTP status {status}"
        subject = str(self._reference)
        if status in {401, 403} and not own:
            return StoreAccessError(f"{subject}: {said}: the registry's storage refuses: ask who runs the registry")
        if status in {401, 403}:
            registry = self._reference.registry
            return StoreAccessError(f"{subject}: {said}: run `docker login {registry}` as who mounts, then mount again")
        if status == 404:
            return ObjectNotFoundError(f"{subject}: {said}")
        if status == 429:
            return StoreThrottledError(f"{subject}: {said}")
        if status in {408, 425} or status >= 500:
            return TransientStoreError(f"{subject}: {said}")
        return StoreUnavailableError(f"{subject}: {said}")


def digest_of(content: bytes) -> str:
    """The digest of a manifest."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def translated(function: Callable[[], T]) -> T:
    """Call *function*, which makes requests. Raises StoreErrors of one line, which show no signed URL."""
    try:
        return function()
    except StoreError:
        raise
    except UNANSWERED as error:
        said = _one_line(error)
        remedies = [remedy for cause, remedy in _REMEDIES.items() if cause in said]
        raise unanswered(error, ": ".join((said, *remedies))) from error
    except MalformedAnswerError as error:
        raise StoreUnavailableError(f"the answer is not from a registry: check the URL: {_one_line(error)}") from error


def _tls() -> Any:
    """The system's certificate authorities, read now: the server may not be able to later."""
    context = create_urllib3_context()
    context.load_default_certs()
    return context


def _authorised(header: str) -> dict[str, str]:
    return {"Authorization": header} if header else {}


def _said(body: bytes) -> str:
    """The first error in an answer."""
    try:
        error = json.loads(body)["errors"][0]
        return _one_line(": ".join(filter(None, (error.get("code"), error.get("message")))))
    except MALFORMED:
        return ""


def _one_line(text: object) -> str:
    return _CONNECTION.sub("", " ".join(str(text)[: 2 * _TEXT_LIMIT].split()))[:_TEXT_LIMIT]


def _shown(url: str) -> str:
    """A URL without its query, which may be a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}"
