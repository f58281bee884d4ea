"""Answers HTTP requests: metrics, and the status page with its data. Read-only."""

import base64
import binascii
import hmac
import ipaddress
import logging
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any

from trimsfs.extras.exporter.merged_metrics import CONTENT_TYPE
from trimsfs.extras.exporter.mounts import Mounts, ScraperGoneError

log = logging.getLogger(__name__)

NAME = "trimsfs-exporter"
"""The Server header, by which a mount command knows an exporter."""
STAY = "/-/stay"
"""What a mount command asks an exporter for that is to end with the last mount."""
REQUEST_TIMEOUT_S = 10.0
"""How long a client may take for its request."""
MOST_REQUESTS = 32
"""Requests that are answered at once; more are turned away."""
_PAGE = Path(__file__).with_name("page")
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/status.css": ("status.css", "text/css; charset=utf-8"),
    "/status.js": ("status.js", "text/javascript; charset=utf-8"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class WebServer(ThreadingMixIn, HTTPServer):
    """Serves on a socket that listens already. A *token* is asked of everybody, if there is one."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, mounts: Mounts, token: str | None) -> None:
        super().__init__(("", 0), _Request, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = "", 0
        self.mounts = mounts
        self.token = token
        self.asked_to_stay = time.monotonic()
        # Read once: an upgrade replaces them, and this program stays the old one.
        self.files = {path: ((_PAGE / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}
        self._free = threading.BoundedSemaphore(MOST_REQUESTS)
        self._began: dict[socket.socket, float] = {}

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = self.socket.accept()
        connection.settimeout(REQUEST_TIMEOUT_S)
        return connection, peer

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._began[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._ended(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._ended(request)

    def _ended(self, request: socket.socket) -> None:
        del self._began[request]
        self._free.release()

    def service_actions(self) -> None:
        """Read no more from clients that have taken too long for their request, byte by byte."""
        now = time.monotonic()
        for request, began in list(self._began.items()):
            if now - began > REQUEST_TIMEOUT_S:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request ended early", exc_info=True)


class _Request(BaseHTTPRequestHandler):
    """One request; the connection is closed after it."""

    server: WebServer
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == STAY:
            self.server.asked_to_stay = time.monotonic()
            self._reply(HTTPStatus.NO_CONTENT, "text/plain", b"")
        elif not self._knows_token():
            self._refuse(HTTPStatus.UNAUTHORIZED, "needs the token of --token-file, as bearer or as a password")
        elif not self._names_this_host():
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "use an IP address or localhost, not another host's name")
        elif path in self.server.files:
            content, kind = self.server.files[path]
            self._reply(HTTPStatus.OK, kind, content)
        else:
            self._answer(path)

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, path: str) -> None:
        try:
            if path == "/metrics":
                self._reply(HTTPStatus.OK, CONTENT_TYPE, self.server.mounts.metrics())
            elif path == "/api/status":
                self._reply(HTTPStatus.OK, "application/json", self.server.mounts.status())
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "there are /, /metrics and /api/status")
        except ScraperGoneError:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the exporter is ending")

    def _knows_token(self) -> bool:
        if self.server.token is None:
            return True
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":  # as browsers send it
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), self.server.token.encode())

    def _names_this_host(self) -> bool:
        """Whether a page of another site cannot have asked, by a name that leads here (DNS rebinding)."""
        if self.server.token is not None or self.server.socket.family == socket.AF_UNIX:
            return True
        host = self.headers.get("Host", "localhost")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost"
        return True

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._reply(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

    def _reply(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Bearer realm="trimsfs"')
            self.send_header("WWW-Authenticate", 'Basic realm="trimsfs", charset="UTF-8"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def version_string(self) -> str:
        return NAME

    def address_string(self) -> str:
        return str(self.client_address[0]) if isinstance(self.client_address, tuple) else "unix"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        log.debug(format, *args)
