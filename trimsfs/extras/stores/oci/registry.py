"""Requests to a registry, by the OCI distribution specification: manifests, and ranges of blobs."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import TypeVar

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.oci.bearer_tokens import Authorisation
from trimsfs.extras.stores.oci.reference import Reference
from trimsfs.options import MountOptions
from trimsfs.stores.http.failures import MALFORMED, MalformedAnswerError, kind_of, one_line, translated
from trimsfs.stores.http.http_client import Headers, HttpClient, Response, same_service

T = TypeVar("T")

MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REMEDIES = {
    "WRONG_VERSION_NUMBER": "set plain_http if the registry has no TLS",
    "CERTIFICATE_VERIFY_FAILED": "set SSL_CERT_FILE to its authorities, if you trust them",
}


class Registry:
    """A repository of a registry, to be asked from any thread. Each request is tried once.

    Methods raise BucketNotFoundError if the artifact does not exist, and else only the StoreErrors of `Store`.
    """

    def __init__(self, reference: Reference, options: MountOptions, *, connections: int) -> None:
        plain = reference.local if options.plain_http is None else options.plain_http
        self._reference = reference
        self._base = f"{'http' if plain else 'https'}://{reference.host}/v2/{reference.path}"
        self._client = HttpClient(self._base, connections=connections, stall_timeout_s=options.stall_timeout)
        self.forget = self._client.forget
        self._authorisation = Authorisation(reference, self._client.send, options)

    def resolve(self) -> str:
        """The digest of the manifest that the reference names now."""
        response = self._ask("HEAD", f"manifests/{self._reference.reference}", {"Accept": ", ".join(MANIFEST_TYPES)})
        self._client.whole(response)
        digest = response.headers.get("Docker-Content-Digest", "")
        return digest if _DIGEST.fullmatch(digest) else digest_of(self.manifest(self._reference.reference))

    def manifest(self, reference: str) -> bytes:
        """The manifest of a tag or digest; of a digest, it has been compared."""
        response = self._ask("GET", f"manifests/{reference}", {"Accept": ", ".join(MANIFEST_TYPES)})
        content = self._client.whole(response)
        if ":" in reference and digest_of(content) != reference:
            raise TransientStoreError(f"{self._reference}: manifest {reference} has other bytes")
        return content

    def blob(self, digest: str, offset: int, length: int) -> Response:
        """The body, urllib3's stream, of *length* bytes of a blob. Raises ObjectNotFoundError."""
        last = offset + length - 1
        headers = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        response = self._client.at_place(digest, headers) or self._send("GET", f"blobs/{digest}", headers, blob=digest)
        try:
            content_range = response.headers.get("Content-Range", "")
            whole = response.status == 200 and offset == 0 and response.headers.get("Content-Length") == str(length)
            if not whole and not content_range.startswith(f"bytes {offset}-{last}/"):
                raise StoreUnavailableError(
                    f"{self._reference}: the registry serves no ranges of layers: asked for bytes {offset}-{last}, "
                    f"got {content_range or f'status {response.status}'}"
                )
        except BaseException:
            response.close()
            self.forget(digest)
            raise
        return response

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """A short range of a blob. Raises ObjectNotFoundError."""
        content = self._client.whole(self.blob(digest, offset, length))
        if len(content) != length:
            raise TransientStoreError(f"asked for {length} bytes, got {len(content)}")
        return content

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, method: str, path: str, headers: Headers) -> Response:
        """The answer to a request about the artifact itself."""
        try:
            return self._send(method, path, headers)
        except ObjectNotFoundError:
            raise BucketNotFoundError(f"artifact {self._reference} does not exist: check the spelling") from None

    def _send(self, method: str, path: str, headers: Headers, *, blob: str = "") -> Response:
        """The answer to a request, authorised and redirected as the registry asks for, once it is a success."""
        url, authorisation = f"{self._base}/{path}", self._authorisation.header
        response, at = self._follow(method, url, headers, authorisation)
        if response.status == 401 and same_service(at, url):  # the storage behind a redirect wants none of the registry
            challenge = response.headers.get("WWW-Authenticate", "")
            self._client.whole(response)
            response, at = self._follow(method, url, headers, self._authorisation.renew(challenge, authorisation))
        own = same_service(at, url)
        if response.status >= 300:
            raise self._error(response.status, self._client.whole(response), own=own)
        if blob and not own:
            self._client.remember(blob, at)
        return response

    def _follow(self, method: str, url: str, headers: Headers, authorisation: str) -> tuple[Response, str]:
        own = {"Authorization": authorisation} if authorisation else {}
        return self._client.follow(method, url, headers, own, f"{self._reference}: the registry")

    def _error(self, status: int, body: bytes, *, own: bool) -> StoreError:
        said = f"{self._reference}: {_said(body) or f'HTTP status {status}'}"
        kind = kind_of(status)
        if kind is StoreAccessError and not own:
            said += ": the registry's storage refuses: ask who runs the registry"
        elif kind is StoreAccessError:
            said += f": run `docker login {self._reference.registry}` as who mounts, then mount again"
        return kind(said)


def digest_of(content: bytes) -> str:
    """The digest of a manifest."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def registry_errors(function: Callable[[], T], _key: str = "") -> T:
    """Call *function*, which makes requests. Raises StoreErrors of one line, which show no signed URL."""

    def malformed(error: MalformedAnswerError) -> StoreError:
        return StoreUnavailableError(f"the answer is not from a registry: check the URL: {one_line(error)}")

    return translated(function, malformed, _REMEDIES)


def _said(body: bytes) -> str:
    """The first error in an answer."""
    try:
        error = json.loads(body)["errors"][0]
        return one_line(": ".join(filter(None, (error.get("code"), error.get("message")))))
    except MALFORMED:
        return ""
