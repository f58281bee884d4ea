"""Bounds on the answers that the SDK reads whole, as listings and errors: in size and in time."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.awsrequest import AWSResponse

from trimsfs.errors import StoreStalledError, TransientStoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

ANSWER_LIMIT = 4 << 20
"""Bytes of the longest answer: 1000 names of 1024 bytes, each of which may be written as three, fit in."""
_PIECE = 1 << 16


class Transport:
    """Sends a client's requests in the SDK's place. Reads no more than ANSWER_LIMIT bytes of an answer that it reads
    whole, and for no longer than *timeout_s*.

    The SDK alone would read everything into memory, and wait for as long as a byte comes now and then.
    """

    def __init__(self, client: "S3Client", timeout_s: float) -> None:
        self._session: Any = client._endpoint.http_session  # type: ignore[attr-defined]  # there is no other way to it
        self._timeout_s = timeout_s
        self._call = _Call()
        before_send: Any = self._before_send  # botocore takes what it returns for the answer
        client.meta.events.register("before-send.s3", before_send)

    def send(self, request: Any) -> AWSResponse:
        """Send a request. A body is left to be read if it is a stream and a success. Raises as the SDK's session does,
        and TransientStoreError."""
        streamed, request.stream_output = request.stream_output, True  # the body is not to be read yet
        response: Any = self._session.send(request)
        request.stream_output = streamed
        if streamed and response.status_code < 300:
            return response  # type: ignore[no-any-return]
        body = _received(response.raw, self._timeout_s)
        return AWSResponse(response.url, response.status_code, response.headers, _Body(body))

    def watched(self, call: Callable[[], T], response: AWSResponse | None = None) -> tuple[T, Any]:
        """What the SDK returns from a call, and the last request that it made for it.

        With a *response*, its first request is not sent: this is the answer.
        """
        self._call.response = response
        try:
            return call(), self._call.sent
        finally:
            self._call.response = self._call.sent = None

    def _before_send(self, request: Any, **_: object) -> AWSResponse:
        response, self._call.response = self._call.response, None
        self._call.sent = request
        return self.send(request) if response is None else response


class _Call(threading.local):
    """The SDK's call in this thread."""

    response: AWSResponse | None = None
    sent: Any = None


def _received(raw: Any, timeout_s: float) -> bytes:
    """All of a body. Raises TransientStoreError."""
    deadline = time.monotonic() + timeout_s
    pieces, size = [], 0
    try:
        while piece := raw.read1(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > ANSWER_LIMIT:
                raise TransientStoreError(f"answer larger than {ANSWER_LIMIT >> 20} MiB")
            if time.monotonic() > deadline:
                raise StoreStalledError(f"no complete answer in {timeout_s:g} s")
    except BaseException:
        raw.close()
        raise
    raw.release_conn()
    return b"".join(pieces)


class _Body:
    """A body that has been read, as the SDK asks for it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def stream(self) -> Iterator[bytes]:
        """All of it."""
        yield self._content
