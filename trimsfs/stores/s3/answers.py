"""Bounds on the answers that the SDK reads whole, as listings and errors: in size and in time."""

import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from botocore.awsrequest import AWSResponse

from trimsfs.errors import StoreStalledError, TransientStoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ANSWER_LIMIT = 4 << 20
"""Bytes of the longest answer: 1000 names of 1024 bytes, each of which may be written as three, fit in."""
_PIECE = 1 << 16


def bound(client: "S3Client", timeout_s: float) -> None:
    """Have a client read no more than ANSWER_LIMIT bytes of an answer, and for no longer than *timeout_s*.

    The SDK alone would read everything into memory, and wait for as long as a byte comes now and then.
    """
    session = client._endpoint.http_session  # type: ignore[attr-defined]  # the SDK has no other way to it
    send: Any = partial(_send, session, timeout_s)  # botocore takes what it returns for the answer
    client.meta.events.register("before-send.s3", send)


def _send(session: Any, timeout_s: float, request: Any, **_: object) -> Any:
    """Send a request in the SDK's place. Raises as that, and TransientStoreError."""
    streamed, request.stream_output = request.stream_output, True  # the body is not to be read yet
    response: Any = session.send(request)
    if streamed and response.status_code < 300:
        return response
    body = _received(response.raw, timeout_s)
    return AWSResponse(response.url, response.status_code, response.headers, _Body(body))


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
