"""What every store over HTTP does, whatever its service: what it makes of answers that are none, and of refusals."""

import re
from functools import partial

import pytest
import trio

from tests.contract.backends import read
from tests.contract.clouds import PATIENCE_S, SERVICES, STALL_S, Cloud, everything, opened, served
from tests.contract.raw_server import raw, respond, stall, then
from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    StoreAccessError,
    StoreError,
    StoreStalledError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.options import MountOptions
from trimsfs.stores.http.bodies import MOST_INTERIM
from trimsfs.stores.open import open_store

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
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


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> Cloud:
    """Each service."""
    return SERVICES[request.param]


@pytest.mark.parametrize("hints", [HINTS, b"HTTP/1.1 100 Continue\r\n\r\n" + 3 * HINTS], ids=["one", "several"])
async def test_the_answer_is_the_one_after_the_interim_ones(service: Cloud, hints: bytes) -> None:
    async with served(service, then(raw(hints), service.missing)) as (_, store):
        with pytest.raises(BucketNotFoundError):
            await store.probe()


async def test_interim_answers_that_never_end_are_no_answer(service: Cloud) -> None:
    async with served(service, then(raw((MOST_INTERIM + 1) * HINTS), service.missing)) as (_, store):
        with trio.fail_after(5), pytest.raises(TransientStoreError, match=r"interim answers|Connection was closed"):
            await store.probe()


async def test_a_refused_connection_is_no_timeout(service: Cloud) -> None:
    """The errors of urllib3 and of the SDK for one are."""
    async with opened(service.url.format(host="127.0.0.1:1"), "http://127.0.0.1:1") as store:
        for error in (await everything(store, service.generation)).values():
            assert type(error) is TransientStoreError
            assert re.search('Connection refused|connect to the endpoint URL: "http://127.0.0.1:1', str(error))


async def test_a_service_that_never_answers_is_given_up_after_the_stall_timeout(service: Cloud) -> None:
    async with served(service, stall, stall_s=STALL_S) as (_, store):
        began = trio.current_time()
        errors = await everything(store, service.generation)
    assert 4 * STALL_S <= trio.current_time() - began < 40
    assert {type(error) for error in errors.values()} == {StoreStalledError}


async def test_request_is_tried_once(service: Cloud) -> None:
    async with served(service, respond("500 Internal Server Error")) as (server, store):
        await everything(store, service.generation)
    connects = [request for request in server.requests if request.startswith(b"HEAD /bucket HTTP")]
    assert (len(server.requests) - len(connects), len(connects) <= 1) == (4, True)


async def test_cancelled_calls_return_at_once_whatever_the_server_does(service: Cloud) -> None:
    async with served(service, stall, stall_s=60) as (server, store):
        async with trio.open_nursery() as nursery:
            for call in (
                partial(read, store, service.generation),
                partial(store.stat, "model"),
                partial(store.list_page, ""),
                store.probe,
            ):
                nursery.start_soon(call)
            with trio.fail_after(PATIENCE_S / 2):
                await server.arrived(4)
            began = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - began < 10


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "s3"], indirect=True)
@pytest.mark.parametrize(("status", "expected"), STATUSES.items())
async def test_a_status_means_the_same_for_every_service(
    service: Cloud, status: str, expected: type[StoreError]
) -> None:
    async with served(service, respond(status)) as (_, store):
        with pytest.raises(StoreError, match=r"\A[^\r\n]+\Z") as caught:
            await store.probe()
    assert type(caught.value) is expected


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "oci"], indirect=True)
@pytest.mark.parametrize(
    "endpoint",
    [
        *("127.0.0.1:9000", "http://", "http://[::1", "http://two words", "ftp://host", "http://h:port"),
        *("http://h:99999", "https://user:SECRET@host", "https://host/?token=SECRET"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_and_its_secrets_not_repeated(service: Cloud, endpoint: str) -> None:
    """It would become part of the store's identity, which the cache keeps, and of error lines."""
    with pytest.raises(ConfigurationError, match=r"\A[^\n]*endpoint URL [^\n]*\Z") as caught:
        open_store(MountOptions(store=service.url, endpoint_url=endpoint), max_requests=1)
    assert "SECRET" not in str(caught.value)
