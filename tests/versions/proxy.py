"""A proxy in front of an S3 server that notes each request, and can hold one back while its client is killed."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.services import HOST, S3Server

DROPPED = {"transfer-encoding", "connection", "content-length"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request and the status of its answer; 0 if the server never got it."""

    method: str
    path: str
    status: int


@dataclass(slots=True)
class Proxy:
    """What has passed. ``before`` and ``after`` are called with the number of a request, from 1 on, before it is
    forwarded and before its answer is; if they return True, the request or its answer is dropped."""

    target: S3Server
    port: int
    requests: list[Request] = field(default_factory=list)
    before: Callable[[int], bool] = lambda _: False
    after: Callable[[int], bool] = lambda _: False
    strip: frozenset[str] = frozenset()
    """The headers, in lower case, that the server does not get: it must not check signatures then."""
    count: int = 0
    passing: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def server(self) -> S3Server:
        """The server as it is behind the proxy."""
        return S3Server(f"http://{HOST}:{self.port}", self.target.access_key, self.target.secret_key)

    def restart(self) -> None:
        """Forget what has passed, and interfere no more."""
        with self.lock:
            self.requests = []
            self.count = 0
            self.before = self.after = lambda _: False

    def settle(self) -> None:
        """Wait until the server has answered all that a dead client has asked."""
        deadline = time.monotonic() + 30
        while self.passing and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.passing

    def uploads(self) -> list[str]:
        """The paths of files and parts that the server took, without what describes versions."""
        return [
            request.path
            for request in self.requests
            if request.method == "PUT" and request.status == 200 and "/.trims-versions/" not in request.path
        ]


@contextlib.contextmanager
def proxy_of(target: S3Server) -> Iterator[Proxy]:
    """Run a proxy until the context ends."""
    netloc = urlsplit(target.endpoint_url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the name in the base class
            """Nobody wants to know."""

        def forward(self) -> None:
            with proxy.lock:
                proxy.passing += 1
            try:
                self.pass_on()
            finally:
                with proxy.lock:
                    proxy.passing -= 1

        def pass_on(self) -> None:
            expected = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(expected)
            if len(body) < expected:
                self.close_connection = True  # the client died while it sent this
                return
            with proxy.lock:
                proxy.count += 1
                number = proxy.count
            if proxy.before(number):
                self.close_connection = True
                return
            with contextlib.closing(http.client.HTTPConnection(netloc, timeout=20)) as upstream:
                headers = {
                    name: value for name, value in self.headers.items() if name.lower() not in {"expect", *proxy.strip}
                }
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                content = answer.read()
                with proxy.lock:
                    proxy.requests.append(Request(self.command, self.path, answer.status))
                if proxy.after(number):
                    self.close_connection = True
                    return
                self.send_response_only(answer.status)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                for name, value in answer.getheaders():
                    if name.lower() not in DROPPED:
                        self.send_header(name, value)
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content)

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.forward)

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        proxy = Proxy(target, server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
