"""Interim answers (1xx) before the answer: every store over HTTP passes them over."""

import pytest
import trio

from tests.contract.clouds import azure_error, google_error, opened
from tests.contract.raw_server import Answer, raw, raw_server, respond, then
from trimsfs.errors import BucketNotFoundError, TransientStoreError
from trimsfs.stores.http.bodies import MOST_INTERIM

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
MISSING: dict[str, Answer] = {
    "s3://bucket": respond("404 Not Found", b"<Error><Code>NoSuchBucket</Code></Error>"),
    "gs://bucket": google_error("404 Not Found", "The specified bucket does not exist."),
    "az://container": azure_error("404 Not Found", "ContainerNotFound"),
    "hf://org/model": respond("404 Not Found", headers={"x-error-code": "RepoNotFound"}),
    "oci://{host}/model:tag": respond("404 Not Found"),
}
"""What says that the container does not exist, by the store's URL."""


@pytest.fixture(autouse=True)
def _account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")


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
