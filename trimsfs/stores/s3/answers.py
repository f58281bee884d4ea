"""Answers: bounds the size and time of those that the SDK reads whole, such as listings and errors."""

import threading
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar

import urllib3
from botocore.awsrequest import AWSResponse

from trimsfs.stores.http.bodies import received

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")


class Transport:
    """Sends a client's requests in the SDK's place. It reads a whole answer, if it is not too long, within
    *timeout_s*.

    The SDK alone would read an answer of any size into memory, and wait while single bytes drip in.
    """

    def __init__(self, client: "S3Client", timeout_s: float) -> None:
        self._session: Any = client._endpoint.http_session  # type: ignore[attr-defined]  # it has no public name
        self._timeout_s = timeout_s
        self._call = _Call()
        before_send: Any = self._before_send  # botocore uses its result as the answer
        client.meta.events.register("before-send.s3", before_send)

    def send(self, request: Any) -> AWSResponse:
        """Send a request. The caller reads the body of a streamed success; all others are read here.

        Raises as the SDK's session does, and TransientStoreError.
        """
        streamed, request.stream_output = request.stream_output, True  # read no body yet
        response: Any = self._session.send(request)
        request.stream_output = streamed
        if streamed and response.status_code < 300:
            return response  # type: ignore[no-any-return]
        body = received(response.raw, self._timeout_s)
        read = urllib3.HTTPResponse(BytesIO(body), preload_content=False)
        return AWSResponse(response.url, response.status_code, response.headers, read)

    def watched(self, call: Callable[[], T], response: AWSResponse | None = None) -> tuple[T, Any]:
        """The result of an SDK *call*, and the last request that the SDK made for it.

        With a *response*, the first request is not sent: the SDK gets this answer.
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
    """The state of this thread's SDK call."""

    response: AWSResponse | None = None
    sent: Any = None
