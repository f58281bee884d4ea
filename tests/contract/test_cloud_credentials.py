"""Where cloud stores get their credentials, and what they say when there are none."""

import base64
import contextlib
import json
import re
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import trio

from tests.contract.backends import read
from tests.contract.clouds import (
    CLOUDS,
    CONTENT,
    PATIENCE_S,
    RIGHT_RANGE,
    SECRET,
    azure_error,
    everything,
    forget,
    opened,
)
from tests.contract.raw_server import Answer, drip, hang_up, raw_server, respond, stall, then
from tests.support.http_server import Server
from trimsfs.errors import ConfigurationError, StoreAccessError, TransientStoreError
from trimsfs.options import MountOptions
from trimsfs.stores.open import open_store

CHINA = "EndpointSuffix=core.chinacloudapi.cn"


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the key file of a service account, whose tokens come from an address."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

    def write(token_uri: str) -> Path:
        account = {"type": "service_account", "client_email": "reader@project", "private_key_id": "1"}
        account |= {"private_key": private.decode(), "token_uri": token_uri, "project_id": "project"}
        (tmp_path / "key.json").write_text(json.dumps(account))
        return tmp_path / "key.json"

    return write


@pytest.fixture
def ask_at(monkeypatch: pytest.MonkeyPatch, key_file: Callable[[str], Path]) -> Callable[[str], None]:
    """Has the chains of Google and Azure ask a service for tokens: Azure's as a managed identity of App Service, the
    only one of azure-identity's that goes without https."""

    def ask(url: str) -> None:
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key_file(f"{url}/token")))
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{url}/msi")
        monkeypatch.setenv("IDENTITY_HEADER", "header")

    return ask


def token_answer(token: str) -> Answer:
    told = {"access_token": token, "token_type": "Bearer", "expires_in": 3600, "expires_on": "4000000000"}
    return respond("200 OK", json.dumps(told).encode(), headers={"Content-Type": "application/json"})


@pytest.mark.promise("credentials", on=("gs", "az"))
@pytest.mark.parametrize("name", ["gs", "az"])
async def test_the_clouds_own_chain_gets_a_token_once(ask_at: Callable[[str], None], name: str) -> None:
    cloud = CLOUDS[name]
    async with (
        raw_server(token_answer("first"), token_answer("second")) as tokens,
        raw_server(cloud.part()) as server,
    ):
        ask_at(tokens.endpoint_url)
        for reads in (3, 1):
            async with opened(cloud.url, server.endpoint_url, anonymous=False) as store:
                for _ in range(reads):
                    await read(store, cloud.generation)
    assert len(tokens.requests) == 2
    used = [re.findall(rb"(?i)authorization: Bearer (\w+)", request) for request in server.requests]
    assert used == [[b"first"]] * 3 + [[b"second"]]
    assert name == "gs" or b"resource=https://storage.azure.com" in unquote_to_bytes(tokens.requests[0])


@pytest.mark.parametrize("name", ["gs", "az"])
async def test_a_token_that_the_store_refuses_is_renewed_once_and_no_program_notices(
    ask_at: Callable[[str], None], name: str
) -> None:
    """As after a key was rotated, or an identity was given a role."""
    cloud = CLOUDS[name]

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, Mapping[str, str], bytes]:
        if request.headers["Authorization"] == "Bearer first":
            return 401, {}, b""
        return 206, {"Content-Range": RIGHT_RANGE, cloud.header: cloud.content}, CONTENT

    async with raw_server(token_answer("first"), token_answer("second")) as tokens:
        ask_at(tokens.endpoint_url)
        with Server(answer).running() as server:
            async with opened(cloud.url, server.url, anonymous=False) as store, trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(read, store, cloud.generation)
    assert len(tokens.requests) == 2
    used = [headers["authorization"] for _, headers in server.requests]
    assert used.count("Bearer second") == 8


@pytest.mark.parametrize("name", ["gs", "az"])
async def test_renewed_credentials_that_are_refused_too_are_told(ask_at: Callable[[str], None], name: str) -> None:
    cloud = CLOUDS[name]
    tokens = [token_answer(f"{number}") for number in range(3)]
    async with raw_server(*tokens) as service, raw_server(respond("401 Unauthorized")) as server:
        ask_at(service.endpoint_url)
        async with opened(cloud.url, server.endpoint_url, anonymous=False) as store:
            with pytest.raises(StoreAccessError, match="check the credentials"):
                await read(store, cloud.generation)
    assert (len(server.requests), len(service.requests)) == (2, 2)


@pytest.mark.parametrize(("name", "silence"), [("gs", "silent"), ("gs", "dripping"), ("az", "silent")])
async def test_a_token_service_that_does_not_answer_once_is_asked_again(
    ask_at: Callable[[str], None], name: str, silence: str
) -> None:
    """All threads wait for the one that asks for a token."""
    cloud = CLOUDS[name]
    unfinished = stall if silence == "silent" else then(respond("200 OK", length=1000), drip(b" ", times=1000))
    answers = unfinished, token_answer("second")
    async with raw_server(*answers) as tokens, raw_server(cloud.part()) as server:
        ask_at(tokens.endpoint_url)
        async with opened(cloud.url, server.endpoint_url, anonymous=False, stall_s=0.3) as store:
            for _ in range(20):
                with contextlib.suppress(TransientStoreError):
                    await read(store, cloud.generation)
                    break
            else:
                pytest.fail("no request had a token")
    assert len(tokens.requests) == 2


async def test_https_goes_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_server(respond("407 Proxy Authentication Required")) as proxy:
        monkeypatch.setenv("https_proxy", proxy.endpoint_url.replace("//", "//us%20er:secret@"))
        monkeypatch.setenv("no_proxy", "direct.example")
        async with opened("gs://bucket", "https://storage.example") as store:
            with pytest.raises(TransientStoreError):
                await store.stat("model")
        assert proxy.requests[0].startswith(b"CONNECT storage.example:443 ")
        assert b"Basic " + base64.b64encode(b"us er:secret") in proxy.requests[0]
        async with opened("gs://bucket", "https://direct.example") as store:
            with pytest.raises(TransientStoreError):
                await store.stat("model")
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("url", "remedy"), [("gs://bucket", "gcloud auth application-default login"), ("az://container", "az login")]
)
async def test_without_credentials_the_message_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, url: str, remedy: str
) -> None:
    for name in ("PATH", "IDENTITY_ENDPOINT", "MSI_ENDPOINT"):
        monkeypatch.setenv(name, "") if name == "PATH" else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")  # no managed identity is looked for
    async with raw_server(respond("200 OK")) as server, opened(url, server.endpoint_url, anonymous=False) as store:
        with pytest.raises(StoreAccessError, match=remedy):
            await store.stat("model")
    assert server.requests == []


async def test_a_refused_token_is_told_and_a_busy_service_is_tried_again(ask_at: Callable[[str], None]) -> None:
    refused = respond("401 Unauthorized", b'{"error": "invalid_grant"}', headers={"Content-Type": "application/json"})
    async with raw_server(refused) as tokens, raw_server(respond("200 OK")) as server:
        for url, expected in (
            (tokens.endpoint_url, pytest.raises(StoreAccessError, match="check the credentials")),
            ("http://127.0.0.1:1", pytest.raises(TransientStoreError)),
        ):
            ask_at(url)
            async with opened("gs://bucket", server.endpoint_url, anonymous=False) as store:
                with expected:
                    await store.stat("model")


@pytest.mark.parametrize("end", ["", "\n"], ids=["as it is", "newline"])
async def test_no_secret_is_in_an_error(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"?sv=2021-12-02&sig={SECRET}{end}")
    told = []
    for answer in (azure_error("403 Forbidden", "AuthenticationFailed"), hang_up, stall):
        async with (
            raw_server(answer) as server,
            opened(
                "az://container", server.endpoint_url, anonymous=False, stall_s=0.5 if answer is stall else PATIENCE_S
            ) as store,
        ):
            told += [str(error) for error in (await everything(store, CLOUDS["az"].generation)).values()]
        assert b"sig=" in server.requests[0]
    assert len(told) == 12
    assert not [text for text in told if SECRET[:8] in text or "sig=" in text]


def test_an_account_that_nothing_names_is_a_mistake_in_the_configuration() -> None:
    for url, text in {
        "az://container": "no storage account: set AZURE_STORAGE_ACCOUNT",
        "az://Container": "is not a container name",
        "gs://b/x": "is not a bucket name",
    }.items():
        with pytest.raises(ConfigurationError, match=text):
            open_store(MountOptions(store=url), max_requests=1)


@pytest.mark.parametrize(
    ("url", "environment", "identity"),
    [
        ("az://con/p", {"AZURE_STORAGE_ACCOUNT": "a"}, "https://a.blob.core.windows.net|az://con/p/"),
        ("abfs://con/p/", {"AZURE_STORAGE_ACCOUNT": "a"}, "https://a.blob.core.windows.net|az://con/p/"),
        ("abfss://con@a.dfs.core.windows.net/p", {}, "https://a.blob.core.windows.net|az://con/p/"),
        (
            "az://con",
            {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=a;AccountKey={SECRET};{CHINA}"},
            "https://a.blob.core.chinacloudapi.cn|az://con/",
        ),
        ("gs://bucket/p", {}, "https://storage.googleapis.com|gs://bucket/p/"),
        ("gcs://bucket", {"STORAGE_EMULATOR_HOST": "localhost:9"}, "http://localhost:9|gs://bucket/"),
    ],
)
def test_a_url_leads_to_an_endpoint(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: Mapping[str, str], identity: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert open_store(MountOptions(store=url, anonymous=True), max_requests=1).identity == identity
