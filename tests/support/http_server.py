"""An HTTP server that answers as a test says, in a thread."""

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, Mapping[str, str], bytes] | bytes | Iterator[bytes]


@dataclass
class Server:
    """*answer* gets a request, and gives status, headers and body, which an answer to HEAD lacks; *tls* is for TLS.

    Bytes instead are sent as they are; so are pieces, after which the connection ends.
    """

    answer: Callable[[BaseHTTPRequestHandler], Answer]
    tls: ssl.SSLContext | None = None
    url: str = ""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                answer = outer.answer(self)
                if not isinstance(answer, tuple):
                    self.close_connection = not isinstance(answer, bytes)
                    with contextlib.suppress(OSError):
                        for piece in [answer] if isinstance(answer, bytes) else answer:
                            self.wfile.write(piece)
                    return
                status, headers, body = answer
                self.send_response_only(status)
                always = {"Date": self.date_time_string(), "Content-Length": str(len(body))}
                for name, value in {**always, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_PATCH = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server looks for

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            if self.tls is not None:
                server.socket = self.tls.wrap_socket(server.socket, server_side=True)
            self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()
