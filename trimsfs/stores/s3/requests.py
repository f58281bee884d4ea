"""GET and HEAD requests for a bucket's objects, made from templates: the SDK takes long to build each request.

The SDK makes the first request of a kind. Later ones are copies of it with another key, range and conditions; the SDK's
signer signs them and its session sends them. The SDK handles every answer that is not a success as if it had sent the
request. It parses errors, follows redirects, and raises its usual errors.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import urllib3
from botocore import UNSIGNED
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse, HeadersDict
from botocore.utils import percent_encode, percent_encode_sequence

from trimsfs.stores.s3.answers import Transport
from trimsfs.stores.s3.s3_errors import by_sdk

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Operation = Literal["get_object", "head_object"]

_HEADERS = {"Range": "Range", "IfMatch": "If-Match", "ChecksumMode": "x-amz-checksum-mode"}
_QUERY = {"VersionId": "versionId", "PartNumber": "partNumber"}
_SIGNATURES = {"v4", "s3v4", "v4-s3express", UNSIGNED}
"""Signatures that need only credentials, or a session, signing name and region. The SDK makes all requests with other
ones."""
_SESSION = ("identity_cache", "cache_key")
"""What of a request's signing context leads to the session of S3 Express, which the SDK renews."""
_SIGNATURE = "trimsfs_signature"
_BY_SIGNER = {
    *("authorization", "date", "host", "x-amz-content-sha256", "x-amz-date", "x-amz-security-token"),
    "x-amz-s3session-token",
}
_INVOCATION, _ATTEMPT = "amz-sdk-invocation-id", "amz-sdk-request"
_DIFFERENT_EACH_TIME = {"x-amz-date", "x-amz-security-token", _INVOCATION}


class Condition(TypedDict, total=False):
    """The content that a request must match, by the SDK's names."""

    IfMatch: str
    VersionId: str


class Parameters(Condition, total=False):
    """All parameters of a request."""

    Range: str
    ChecksumMode: Literal["ENABLED"]
    PartNumber: int


@dataclass(frozen=True, slots=True)
class ObjectAnswer:
    """A success. Look ``headers`` up in lower case; ``body`` is urllib3's stream, None for HEAD."""

    headers: Mapping[str, str]
    body: Any


class ObjectRequests:
    """Requests for the objects of a bucket, from any thread. They raise the SDK's errors."""

    def __init__(self, client: "S3Client", transport: Transport, bucket: str) -> None:
        self._client = client
        self._transport = transport
        self._bucket = bucket
        self._templates: dict[Operation, _Template | None] = {}
        client.meta.events.register("before-sign.s3", _note_signature)

    def get(self, key: str, **parameters: Unpack[Parameters]) -> ObjectAnswer:
        """GET an object. The caller closes the body."""
        return self._answer("get_object", key, parameters)

    def head(self, key: str, **parameters: Unpack[Parameters]) -> ObjectAnswer:
        """HEAD an object."""
        return self._answer("head_object", key, parameters)

    def learn(self) -> None:
        """Learn the template of GET from a request that is not sent: the first reader need not wait for the SDK."""
        if self._templates.get("get_object") is not None:
            return
        empty = urllib3.HTTPResponse(BytesIO(), preload_content=False)
        headers: Any = HeadersDict({"content-length": "0"})
        answer = AWSResponse("", 206, headers, empty)
        self._by_sdk("get_object", "key", {"Range": "bytes=0-0", "IfMatch": '"etag"'}, answer)

    def _answer(self, operation: Operation, key: str, parameters: Parameters) -> ObjectAnswer:
        template = self._templates.get(operation)
        if template is None:
            return self._by_sdk(operation, key, parameters)
        response = self._transport.send(template.request(self._client, key, parameters))
        if response.status_code < 300:
            return ObjectAnswer(response.headers, response.raw)
        return self._by_sdk(operation, key, parameters, response)

    def _by_sdk(self, operation: Operation, key: str, parameters: Parameters, response: Any = None) -> ObjectAnswer:
        """Have the SDK make a request, or handle *response* as its answer, and learn the template for later ones."""
        call: Any = partial(getattr(self._client, operation), Bucket=self._bucket, Key=key, **parameters)
        result, request = self._transport.watched(call, response)
        about = result["ResponseMetadata"]
        # A redirected request is no template: the SDK sends the next one to the bucket's region at once.
        redirected = about.get("RetryAttempts") != 0
        self._templates[operation] = None if redirected else _learned(self._client, request, key, parameters)
        return ObjectAnswer(about["HTTPHeaders"], result["Body"]._raw_stream if "Body" in result else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Template:
    """What all requests of an operation share. ``base`` is the URL up to the key. ``headers`` lack those of the signer
    and of the attempt."""

    method: str
    base: str
    headers: Mapping[str, str]
    attempt: str | None
    signature_version: Any
    signing_name: str | None
    region: str | None
    session: Mapping[str, Any]
    streamed: bool

    def request(self, client: Any, key: str, parameters: Parameters) -> AWSPreparedRequest:
        """A request ready to send. Raises the errors of signing: each request looks up the credentials."""
        own = {_HEADERS[name]: value for name, value in parameters.items() if name in _HEADERS}
        request: Any = AWSRequest(
            method=self.method,
            url=self.base + _tail(key, parameters),
            headers={**own, **self.headers},
            stream_output=self.streamed,
        )
        request.context["client_config"] = client.meta.config
        if self.signature_version is not UNSIGNED:
            with by_sdk():
                client._request_signer.get_auth_instance(
                    self.signing_name, self.region, signature_version=self.signature_version, **self.session
                ).add_auth(request)
        if self.attempt is not None:
            request.headers[_INVOCATION] = str(uuid.uuid4())
            request.headers[_ATTEMPT] = self.attempt
        prepared: AWSPreparedRequest = client._endpoint.prepare_request(request)
        return prepared


def _tail(key: str, parameters: Parameters) -> str:
    """The part of the URL after the bucket, quoted as the SDK quotes it."""
    query = {_QUERY[name]: value for name, value in parameters.items() if name in _QUERY}
    path: str = percent_encode(key, safe="/~")
    return f"{path}?{percent_encode_sequence(query)}" if query else path


def _note_signature(request: Any, signature_version: Any, **_: object) -> None:
    """Keep the signature version, which the SDK tells only before it signs."""
    request.context[_SIGNATURE] = signature_version


def _learned(client: Any, sent: Any, key: str, parameters: Parameters) -> _Template | None:
    """The template of a request that the SDK has sent; None unless it reproduces that request."""
    version, tail = sent.context.get(_SIGNATURE), _tail(key, parameters)
    if version not in _SIGNATURES or not sent.url.endswith(tail):
        return None
    headers = _headers(sent)
    own = {_HEADERS[name].lower() for name in parameters if name in _HEADERS}
    signing = sent.context.get("signing", {})
    template = _Template(
        method=sent.method,
        base=sent.url.removesuffix(tail),
        headers={
            name: value
            for name, value in ((str(name), _text(value)) for name, value in sent.headers.items())
            if name.lower() not in _BY_SIGNER | own | {_INVOCATION, _ATTEMPT}
        },
        attempt=headers.get(_ATTEMPT),
        signature_version=version,
        signing_name=signing.get("signing_name"),
        region=signing.get("region"),
        session={name: signing[name] for name in _SESSION if name in signing},
        streamed=sent.stream_output,
    )
    return template if _same(template.request(client, key, parameters), sent) else None


def _same(made: Any, sent: Any) -> bool:
    """Whether two requests are equal but for their times."""
    return (made.method, made.url, made.body, made.stream_output, _comparable(made)) == (
        *(sent.method, sent.url, sent.body, sent.stream_output),
        _comparable(sent),
    )


def _comparable(request: Any) -> dict[str, str]:
    """The headers of a request without those that differ each time. Renewed credentials may differ, too."""
    headers = {name: "" if name in _DIFFERENT_EACH_TIME else value for name, value in _headers(request).items()}
    if "authorization" in headers:
        _, _, scope = headers["authorization"].partition("/")
        headers["authorization"] = scope.partition("Signature=")[0]
    return headers


def _headers(request: Any) -> dict[str, str]:
    return {str(name).lower(): _text(value) for name, value in request.headers.items()}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
