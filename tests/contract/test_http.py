"""What every store over HTTP does, whatever its service: what it makes of answers that are none, and of refusals."""

import pytest
import trio

from tests.contract.backends import read
from tests.contract.clouds import PATIENCE_S, azure_error, everything, google_error, opened
from tests.contract.raw_server import Answer, raw, raw_server, respond, stall, then
from trimsfs.errors import (
    BucketNotFoundError,
    StoreAccessError,
    StoreError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.stores.http.bodies import MOST_INTERIM
from trimsfs.types import Generation

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
MISSING: dict[str, Answer] = {
    "s3://bucket": respond("404 Not Found", b"<Error><Code>NoSuchBucket</Code></Error>"),
    "gs://bucket": google_error("404 Not Found", "The specified bucket does not exist."),
    "az://container": azure_error("404 Not Found", "ContainerNotFound"),
    "hf://org/model": respond("404 Not Found", headers={"x-error-code": "RepoNotFound"}),
    "oci://{host}/model:tag": respond("404 Not Found"),
}
"""What says that the container does not exist, by the store's URL."""
ETAGS = {"gs://bucket": "1", "oci://{host}/model:tag": f"sha256:{'0' * 64}"}
"""ETags as only some stores have them."""
STATUSES: dict[str, type[StoreError]] = {
    "400 Bad Request": StoreUnavailableError,
    "401 Unauthorized": StoreAccessError,
    "403 Forbidden": StoreAccessError,
    "408 Request Timeout": TransientStoreError,
    "425 Too Early": TransientStoreError,
    "429 Too Many Requests": StoreThrottledError,
    "500 Internal Server Error": TransientStoreError,
    "503 Service Unavailable": StoreThrottledError,
}
"""What a status without a reason means, but for S3: there, an answer to HEAD is one, too."""


@pytest.fixture(autouse=True)
def _account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")


def generation(url: str) -> Generation:
    """One that the store of a URL may have given."""
    return Generation(key="model", etag=ETAGS.get(url, '"x"'), size=1000, modified_ns=0)


@pytest.mark.parametrize("hints", [HINTS, b"HTTP/1.1 100 Continue\r\n\r\n" + 3 * HINTS], ids=["one", "several"])
@pytest.mark.parametrize("url", MISSING)
async def test_the_answer_is_the_one_after_the_interim_ones(url: str, hints: bytes) -> None:
    async with raw_server(then(raw(hints), MISSING[url])) as server:
        host = server.endpoint_url.removeprefix("http://")
        async with opened(url.format(host=host), server.endpoint_url) as store:
            with pytest.raises(BucketNotFoundError):
                await store.probe()


@pytest.mark.parametrize("url", MISSING)
async def test_interim_answers_that_never_end_are_no_answer(url: str) -> None:
    async with raw_server(then(raw((MOST_INTERIM + 1) * HINTS), MISSING[url])) as server:
        host = server.endpoint_url.removeprefix("http://")
        async with opened(url.format(host=host), server.endpoint_url) as store:
            with trio.fail_after(5), pytest.raises(TransientStoreError, match=r"interim answers|Connection was closed"):
                await store.probe()


@pytest.mark.parametrize("url", MISSING)
async def test_a_refused_connection_is_no_timeout(url: str) -> None:
    """The errors of urllib3 and of the SDK for one are."""
    async with opened(url.format(host="127.0.0.1:1"), "http://127.0.0.1:1") as store:
        for error in (await everything(store, generation(url))).values():
            assert type(error) is TransientStoreError
            assert "Connection refused" in str(error) or "Could not connect to the endpoint" in str(error)
            assert "timeout" not in str(error)


@pytest.mark.parametrize("url", MISSING)
async def test_request_is_tried_once(url: str) -> None:
    async with raw_server(respond("500 Internal Server Error")) as server:
        host = server.endpoint_url.removeprefix("http://")
        async with opened(url.format(host=host), server.endpoint_url) as store:
            await everything(store, generation(url))
    connects = [request for request in server.requests if request.startswith(b"HEAD /bucket HTTP")]
    assert (len(server.requests) - len(connects), len(connects) <= 1) == (4, True)


@pytest.mark.parametrize("url", MISSING)
async def test_cancelled_calls_return_at_once_whatever_the_server_does(url: str) -> None:
    async with raw_server(stall) as server:
        host = server.endpoint_url.removeprefix("http://")
        async with opened(url.format(host=host), server.endpoint_url, stall_s=60) as store:
            async with trio.open_nursery() as nursery:
                for call in (
                    lambda: read(store, generation(url)),
                    lambda: store.stat("model"),
                    lambda: store.list_page(""),
                    store.probe,
                ):
                    nursery.start_soon(call)
                with trio.fail_after(PATIENCE_S / 2):
                    await server.arrived(4)
                began = trio.current_time()
                nursery.cancel_scope.cancel()
            assert trio.current_time() - began < 10


@pytest.mark.parametrize("url", [url for url in MISSING if not url.startswith("s3:")])
@pytest.mark.parametrize(("status", "expected"), STATUSES.items())
async def test_a_status_means_the_same_for_every_service(url: str, status: str, expected: type[StoreError]) -> None:
    async with raw_server(respond(status)) as server:
        host = server.endpoint_url.removeprefix("http://")
        async with opened(url.format(host=host), server.endpoint_url) as store:
            with pytest.raises(StoreError, match=r"\A[^\r\n]+\Z") as caught:
                await store.probe()
    assert type(caught.value) is expected
