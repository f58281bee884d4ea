"""Connections to the endpoint of a cloud store: they sign requests, and renew credentials that it refuses."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, Protocol
from urllib.parse import quote, urlencode, urlsplit

from trimsfs import __version__
from trimsfs.stores.http.http_client import HttpClient, Response


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
    """

    def __init__(self, endpoint: str, sign: Sign, *, connections: int, stall_timeout_s: float) -> None:
        self._sign = sign
        self._client = http_client(endpoint, connections=connections, stall_timeout_s=stall_timeout_s)
        self._service = "{0.scheme}://{0.netloc}".format(urlsplit(endpoint))

    def send(self, request: Request) -> Response:
        """The answer with its body unread, which the caller closes. Raises UNANSWERED and MalformedAnswerError."""
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

    def whole(self, response: Response) -> Answer:
        """Read the rest of an answer. Raises UNANSWERED and TransientStoreError."""
        return Answer(response.status, response.headers, self._client.whole(response))

    def _sent(self, signed: Request) -> Response:
        headers = {"User-Agent": f"trimsfs/{__version__}", **signed.headers}
        return self._client.send(signed.method, self._service + signed.target, headers, decodes=False)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._client.close()


def http_client(endpoint: str, *, connections: int, stall_timeout_s: float) -> HttpClient:
    """The client of an endpoint; through a proxy if the environment names one for https://."""
    return HttpClient(
        endpoint,
        connections=connections,
        stall_timeout_s=stall_timeout_s,
        cafile=os.environ.get("REQUESTS_CA_BUNDLE") or None,
        proxied=("https",),
    )
