"""Authorisation at a registry: the token or password that its challenge asks for."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urlsplit

from trimsfs.errors import StoreAccessError, TransientStoreError
from trimsfs.extras.stores.oci.reference import Reference, is_local
from trimsfs.extras.stores.oci.registry_credentials import Credentials, DockerConfig
from trimsfs.options import MountOptions
from trimsfs.stores.http.bodies import received
from trimsfs.stores.http.failures import parsing

TIMEOUT_S = 10.0
"""How long a token service may take for its answer."""
_PARAMETER = re.compile(r'([A-Za-z_]+)="([^"]*)"')
_CLIENT = "trimsfs"


class Authorisation:
    """The Authorization header for a repository, for any thread: one thread at a time renews it, for all."""

    def __init__(self, reference: Reference, exchange: Callable[..., Any], options: MountOptions) -> None:
        self.header = ""
        self._reference = reference
        self._exchange = exchange
        self._plain_http = options.plain_http
        self._config = None if options.anonymous else DockerConfig(reference.servers)
        self._lock = threading.Lock()

    def renew(self, challenge: str, refused: str) -> str:
        """The header that answers the challenge which came instead of an answer to the *refused* one.

        Raises StoreAccessError if there are no credentials, or the token service refuses them, and TransientStoreError.
        """
        with self._lock:
            if self.header == refused:  # else another thread has renewed it meanwhile
                self.header = self._answer(challenge)
            return self.header

    def _answer(self, challenge: str) -> str:
        scheme, _, rest = challenge.partition(" ")
        credentials = self._config.credentials() if self._config is not None else None
        if scheme.lower() == "basic":
            if credentials is None or credentials.identity_token:
                raise self._refused("the registry wants a user and a password")
            return credentials.basic
        if scheme.lower() != "bearer":
            raise self._refused(f"the registry wants {scheme[:40] or 'an unnamed kind of credentials'!r}")
        return self._token(dict(_PARAMETER.findall(rest)), credentials)

    def _token(self, asked: dict[str, str], credentials: Credentials | None) -> str:
        """A token of the service that a challenge names."""
        realm = asked.get("realm", "")
        with parsing():
            service = urlsplit(realm)
            here = self._plain_http is None and self._reference.local and is_local(service.hostname or "")
        if service.scheme != "https" and not (service.scheme == "http" and (self._plain_http or here)):
            raise self._refused(f"its token service {realm!r} has no TLS")
        scope = asked.get("scope") or f"repository:{self._reference.path}:pull"
        query = {"scope": scope, **({"service": asked["service"]} if "service" in asked else {})}
        if credentials is not None and credentials.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": _CLIENT}
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            response = self._exchange("POST", realm, headers, urlencode({**form, **query}).encode())
        else:
            headers = {} if credentials is None else {"Authorization": credentials.basic}
            joint = "&" if service.query else "?"
            response = self._exchange("GET", f"{realm}{joint}{urlencode(query)}", headers)
        body = received(response, TIMEOUT_S)
        if response.status in {429, 503} or response.status >= 500:
            raise TransientStoreError(f"{self._reference}: the token service answered with status {response.status}")
        if response.status >= 300:
            raise self._refused(f"the token service answered with status {response.status}")
        with parsing():
            answer = json.loads(body)
            token = answer.get("token") or answer["access_token"]
            if not isinstance(token, str) or not token.isascii() or not token.isprintable():
                raise ValueError("its token is not a token")
        return f"Bearer {token}"

    def _refused(self, cause: str) -> StoreAccessError:
        registry = self._reference.registry
        return StoreAccessError(
            f"{self._reference}: {cause}: run `docker login {registry}` as who mounts, then mount again"
        )
