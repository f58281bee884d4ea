"""HTTP connections to the endpoint of a cloud store: they sign and send requests, and bound the answers."""

import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlencode, urlsplit

import urllib3
from urllib3.connection import HTTPConnection

from trimsfs import __version__
from trimsfs.stores.http.bodies import CONNECT_TIMEOUT_S, parsing, received
from trimsfs.stores.http.endpoints import Pools


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request. ``path`` is quoted, and begins with the path of the endpoint; values of ``query`` are not quoted."""

    path: str
    method: Literal["GET", "HEAD"] = "GET"
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """Path and query."""
        return f"{self.path}?{urlencode(self.query, quote_via=quote)}" if self.query else self.path


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its whole body. Names of ``headers`` match in any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Sign(Protocol):
    """Adds credentials to a request, in any thread."""

    def __call__(self, request: Request, *, refused: Request | None = None) -> Request:
        """The signed request. Its credentials are not those of the one that the store has *refused*, if they can be
        renewed. Raises StoreError.

        It may ask a service for a token first.
        """


def unsigned(request: Request, *, refused: Request | None = None) -> Request:
    """Send a request without credentials."""
    return request


class Connections:
    """Connections to one endpoint, for any thread. Requests are tried once, or once more with renewed credentials.
    Redirects are not followed.

    Nothing is connected before the first request, so that an unused one works in a forked process.
    """

    def __init__(self, endpoint: str, sign: Sign, *, connections: int, stall_timeout_s: float) -> None:
        self._sign = sign
        self._timeout_s = 2 * stall_timeout_s
        self._manager = pool_manager(endpoint, connections)
        self._pool = self._manager.connection_from_url(endpoint)
        self._limits = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=stall_timeout_s)

    def send(self, request: Request) -> Any:
        """urllib3's response with its body unread, which the caller closes. Raises urllib3's errors and
        MalformedAnswerError."""
        signed = self._sign(request)
        response = self._sent(signed)
        if response.status != HTTPStatus.UNAUTHORIZED:
            return response
        try:
            renewed = self._sign(request, refused=signed)
        except BaseException:
            response.close()
            raise
        if renewed == signed:
            return response
        response.close()
        return self._sent(renewed)

    def ask(self, request: Request) -> Answer:
        """Send a request and read the answer whole. Raises as `send` does, and TransientStoreError."""
        return self.whole(self.send(request))

    def whole(self, raw: Any) -> Answer:
        """Read the rest of a response. Raises urllib3's errors and TransientStoreError."""
        return Answer(raw.status, raw.headers, received(raw, self._timeout_s))

    def _sent(self, signed: Request) -> Any:
        with parsing():
            return self._pool.urlopen(
                signed.method,
                signed.target,
                headers={"User-Agent": f"trimsfs/{__version__}", **signed.headers},
                redirect=False,
                retries=False,
                timeout=self._limits,
                preload_content=False,
                decode_content=False,
            )

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._manager.clear()


def pool_manager(endpoint: str, connections: int) -> urllib3.PoolManager:
    """The pools of an endpoint's connections; through a proxy if the environment names one for its https://."""
    parts = urlsplit(endpoint)
    about: dict[str, Any] = {
        "maxsize": connections,
        "socket_options": [*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
    }
    if parts.scheme != "https":
        return urllib3.PoolManager(**about)
    # Reads the certificates now: the server may not be allowed to later.
    about["ssl_context"] = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE") or None)
    return Pools(**about).of(endpoint)
