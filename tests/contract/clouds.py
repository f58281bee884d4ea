"""Services whose servers give the answers that a test wants: S3 and the clouds."""

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from tests.contract import backends
from tests.contract.backends import MAX_REQUESTS, read
from tests.contract.raw_server import Answer, RawServer, raw_server, respond
from trimsfs.errors import StoreError, StoreUnclearError, TransientStoreError
from trimsfs.options import MountOptions
from trimsfs.stores.base import Store
from trimsfs.stores.open import open_store
from trimsfs.types import Generation

SIZE = 300_000
STALL_S, PATIENCE_S = 0.3, 10.0
"""Stall timeouts where an answer stalls, and where none does."""
CONTENT = bytes(range(250)) * (SIZE // 250)
SECRET = base64.b64encode(b"a secret key that no message shows").decode()
RIGHT_RANGE = f"bytes 0-{SIZE - 1}/{SIZE}"


@dataclass(frozen=True, slots=True)
class Cloud:
    """A kind of service: the store's URL, a generation, and the header that names the content of an answer."""

    url: str
    etag: str
    missing: Answer
    """The answer to a read where the container does not exist."""
    header: str = ""
    other: str = ""
    """Another content, as that header tells it."""
    product: str = ""
    unlike: Mapping[str, type[StoreError]] = field(default_factory=dict)
    """The errors for answers that mean something else than to the others, by what a test calls them."""

    @property
    def generation(self) -> Generation:
        return Generation(key="dir/model", etag=self.etag, size=SIZE, modified_ns=0)

    @property
    def content(self) -> str:
        return self.etag.partition(";")[0]

    def part(
        self,
        body: bytes = CONTENT,
        *,
        length: int = SIZE,
        content_range: str = RIGHT_RANGE,
        content: str | None = None,
        encoding: str | None = None,
    ) -> Answer:
        """The answer to a ranged GET of the whole object, right except for what is given."""
        headers = {"Content-Range": content_range, self.header: content or self.content}
        headers |= {} if encoding is None else {"Content-Encoding": encoding}
        return respond("206 Partial Content", body, length=length, headers=headers)


def google_error(status: str, message: str) -> Answer:
    code = int(status.split(maxsplit=1)[0])
    error = {"code": code, "message": message, "errors": [{"reason": "because", "message": message}]}
    return respond(status, json.dumps({"error": error}).encode(), headers={"Content-Type": "application/json"})


def azure_error(status: str, code: str, message: str = "because") -> Answer:
    body = f"\ufeff<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return respond(status, body.encode(), headers={"x-ms-error-code": code})


def s3_error(status: str, code: str = "", message: str = "because", headers: Mapping[str, str] | None = None) -> Answer:
    """An error as S3 tells it, or with no body."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
    return respond(status, body.encode(), headers=headers)


CLOUDS = {
    "s3": Cloud(
        url="s3://bucket",
        etag='"right"',
        header="ETag",
        other='"wrong"',
        missing=s3_error("404 Not Found", "NoSuchBucket"),
        product="S3",
        unlike={"no name of its content": TransientStoreError, "400": StoreUnclearError},
    ),
    "gs": Cloud(
        url="gs://bucket",
        etag="1700000000000001;crc32c=AAAAAA==",
        header="x-goog-generation",
        other="1700000000000002",
        missing=google_error("404 Not Found", "The specified bucket does not exist."),
        product="Google Cloud Storage",
    ),
    "az": Cloud(
        url="az://container",
        etag="0x8DB000000000001",
        header="ETag",
        other='"0x8DB000000000002"',
        missing=azure_error("404 Not Found", "ContainerNotFound"),
        product="Azure Blob Storage",
    ),
}


SERVICES = {
    **CLOUDS,
    "hf": Cloud(
        url="hf://org/model", etag='"x"', missing=respond("404 Not Found", headers={"x-error-code": "RepoNotFound"})
    ),
    "oci": Cloud(url="oci://{host}/model:tag", etag=f"sha256:{'0' * 64}", missing=respond("404 Not Found")),
}
"""All that speak HTTP; the last ones have no `Cloud.part`."""


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name no credentials, and google-auth look for none elsewhere."""
    backends.forget(monkeypatch, "AWS_", "AZURE_", "GOOGLE_", "STORAGE_", "CLOUDSDK_")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")


def opened(url: str, endpoint_url: str, *, anonymous: bool = True, stall_s: float = PATIENCE_S) -> aclosing[Store]:
    """A store of this server."""
    options = MountOptions(store=url, endpoint_url=endpoint_url, anonymous=anonymous, stall_timeout=stall_s)
    return aclosing(open_store(options, max_requests=MAX_REQUESTS))


@asynccontextmanager
async def served(
    cloud: Cloud, *answers: Answer, anonymous: bool = True, stall_s: float = PATIENCE_S
) -> AsyncIterator[tuple[RawServer, Store]]:
    """A store whose server gives these answers, and the server."""
    async with raw_server(*answers) as server:
        url = cloud.url.format(host=server.endpoint_url.removeprefix("http://"))
        async with opened(url, server.endpoint_url, anonymous=anonymous, stall_s=stall_s) as store:
            yield server, store


async def everything(store: Store, generation: Generation) -> dict[str, StoreError]:
    """The errors of all calls, by the call."""
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "probe": store.probe,
        "list_page": lambda: store.list_page(""),
        "stat": lambda: store.stat("model"),
        "read": lambda: read(store, generation),
    }
    errors = {}
    for name, call in calls.items():
        with pytest.raises(StoreError, match=r"\A[^\r\n]+\Z") as caught:
            await call()
        errors[name] = caught.value
    return errors
