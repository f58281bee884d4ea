"""The HTTP client of stores that speak HTTP themselves: requests, redirects, and the places to which they lead."""

import socket
import ssl
import threading
from collections.abc import Callable, Hashable, Mapping
from urllib.parse import urljoin, urlsplit

import urllib3
from cachetools import TTLCache
from urllib3.connection import HTTPConnection

from trimsfs.errors import StoreUnavailableError
from trimsfs.stores.http.bodies import ANSWER_LIMIT, CONNECT_TIMEOUT_S, received
from trimsfs.stores.http.endpoints import Pools
from trimsfs.stores.http.failures import parsing

Response = urllib3.BaseHTTPResponse
Headers = Mapping[str, str]

MOST_REDIRECTS = 5
PLACES = 4096
"""Places of objects to remember."""
PLACE_TTL_S = 60.0
"""How long the client asks an object's place without asking the service. Signed addresses live for minutes, and another
place may serve the object better by then."""
_REDIRECTS = {301, 302, 303, 307, 308}
_BYTES = {200, 206}
"""How a place answers with bytes; else its signed address may have expired, or the place be out of order."""


class HttpClient:
    """Requests to the service of an *endpoint*, and to where it redirects, from any thread. Each is tried once.

    Methods raise MalformedAnswerError and UNANSWERED besides StoreErrors: `translated` makes StoreErrors of these.
    Nothing is connected before the first request, so that an unused client works in a forked process.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        connections: int,
        stall_timeout_s: float,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        cafile: str | None = None,
        proxied: tuple[str, ...] = ("http", "https"),
    ) -> None:
        self._timeout_s = 2 * stall_timeout_s
        self._pools = Pools(
            proxied,
            maxsize=connections,
            retries=False,
            timeout=urllib3.Timeout(connect=connect_timeout_s, read=stall_timeout_s),
            # Reads the certificates now: the server may not be allowed to later.
            ssl_context=ssl.create_default_context(cafile=cafile) if endpoint.startswith("https:") else None,
            socket_options=[*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
        )
        self._places: TTLCache[Hashable, str] = TTLCache(PLACES, PLACE_TTL_S)
        self._lock = threading.Lock()

    def send(
        self, method: str, url: str, headers: Headers, body: bytes | str | None = None, *, decodes: bool = True
    ) -> Response:
        """The answer to one request, its body unread, which the caller closes; decompressed if it *decodes*."""
        with parsing():
            return self._pools.of(url).request(
                method, url, headers=headers, body=body, redirect=False, preload_content=False, decode_content=decodes
            )

    def whole(self, response: Response, *, limit: int = ANSWER_LIMIT) -> bytes:
        """The rest of an answer, at most *limit* bytes."""
        return received(response, self._timeout_s, limit=limit)

    def follow(
        self,
        method: str,
        url: str,
        headers: Headers,
        own: Headers,
        who: str,
        body: str | None = None,
        look: Callable[[Response], None] = lambda _: None,
    ) -> tuple[Response, str]:
        """The answer at the end of redirects, and its address. Only the service of *url* itself gets the headers *own*.

        *look* may refuse any answer of that service. Raises StoreUnavailableError, which names *who* redirects, to
        where there is no TLS or without end.
        """
        first, at = url, url
        for _ in range(MOST_REDIRECTS + 1):
            served = same_service(at, first)
            response = self.send(method, at, {**headers, **own} if served else headers, body)
            if served:
                look(response)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response, at
            self.whole(response)
            with parsing():
                at = urljoin(at, location)
                parts = urlsplit(at)
            if parts.scheme not in {urlsplit(first).scheme, "https"}:
                place = f"{parts.scheme}://{parts.hostname or ''}"  # without a signature
                raise StoreUnavailableError(f"{who} redirects to {place}, without TLS")
        raise StoreUnavailableError(f"{who}: more than {MOST_REDIRECTS} redirects")

    def at_place(self, name: Hashable, headers: Headers) -> Response | None:
        """The bytes of an object from its place, if it is known and still serves them."""
        with self._lock:
            place = self._places.get(name)
        if place is None:
            return None
        try:
            response = self.send("GET", place, headers)
        except BaseException:
            self.forget(name)  # the service may send the next attempt to another place
            raise
        if response.status in _BYTES:
            return response
        response.close()
        self.forget(name)
        return None

    def remember(self, name: Hashable, place: str) -> None:
        """From now on, read an object at the place to which the service has sent for it."""
        with self._lock:
            self._places[name] = place

    def forget(self, name: Hashable) -> None:
        """Ask the service where to read an object when it is read next."""
        with self._lock:
            self._places.pop(name, None)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        self._pools.clear()


def same_service(one: str, other: str) -> bool:
    """Whether two addresses are of one service, which may see the credentials for the other."""
    return urlsplit(one)[:2] == urlsplit(other)[:2]
