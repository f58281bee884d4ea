"""Which store a URL names, and whether it is there."""

import sys

import pytest
from botocore.exceptions import ConnectionClosedError, ConnectTimeoutError
from urllib3 import HTTPConnectionPool
from urllib3.exceptions import MaxRetryError

from tests.support.stores import MemoryStore, as_store
from trimsfs import extras
from trimsfs.errors import BucketNotFoundError, ConfigurationError, StoreUnavailableError, TransientStoreError
from trimsfs.extras.stores.fsspec import FsspecStore
from trimsfs.options import MountOptions
from trimsfs.stores.open import open_store
from trimsfs.stores.reach import reach, unreachable
from trimsfs.stores.s3.s3_errors import translated


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [
        ("gs://bucket", "google.auth.exceptions", "gs"),
        ("az://container", "azure.identity", "az"),
        ("abfss://container@account.dfs.core.windows.net", "azure.core.exceptions", "az"),
        ("hf://org/m", "huggingface_hub", "hf"),
        ("memory://x", "fsspec", "fsspec"),
    ],
)
def test_a_store_whose_package_is_not_installed_names_the_extra(
    url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    with pytest.raises(ConfigurationError) as caught:
        open_store(MountOptions(store=url), max_requests=1)
    assert f"store {url}: " in str(caught.value)
    assert f": pip install 'trimsfs[{extra}]'" in str(caught.value)


def test_a_store_is_opened_by_the_extra_that_has_the_scheme_of_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    schemes = {"ours": f"{FsspecStore.__module__}:FsspecStore", "*": "nothing:Nothing"}
    monkeypatch.setitem(extras.PLUGINS, "stores", schemes)
    with pytest.raises(ConfigurationError, match="store ours://x: "):
        open_store(MountOptions(store="ours://x"), max_requests=1)
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        open_store(MountOptions(store="others://x"), max_requests=1)
    monkeypatch.delitem(extras.PLUGINS, "stores")
    with pytest.raises(ConfigurationError, match=r"store ours://x: no store has this scheme: write s3://BUCKET"):
        open_store(MountOptions(store="ours://x"), max_requests=1)


async def test_a_prefix_with_nothing_under_it_is_told_unless_that_is_allowed(caplog: pytest.LogCaptureFixture) -> None:
    options = MountOptions(store="s3://bucket/typo")
    await reach(as_store(MemoryStore({"a": b"a"})), options, deadline_s=1)
    with pytest.raises(BucketNotFoundError, match=r"s3://bucket/typo: there is nothing under it: .* --allow-empty"):
        await reach(as_store(MemoryStore()), options, deadline_s=1)
    await reach(as_store(MemoryStore()), options.model_copy(update={"allow_empty": True}), deadline_s=1)
    assert "there is nothing under it" in caplog.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ConnectTimeoutError(endpoint_url="https://bucket.s3.amazonaws.com/net/b?versionId=7"),
            'Connect timeout on endpoint URL: "https://bucket.s3.amazonaws.com"',
        ),
        (
            ConnectionClosedError(endpoint_url="http://127.0.0.1:9000/bucket/net/b"),
            'Connection was closed before we received a valid response from endpoint URL: "http://127.0.0.1:9000"',
        ),
        (
            MaxRetryError(HTTPConnectionPool("minio", 9000), "/bucket/net/b"),
            "HTTPConnectionPool(host='minio', port=9000): Max retries exceeded with url:  (Caused by None)",
        ),
    ],
)
def test_what_is_wrong_with_the_network_is_told_without_the_object_that_was_asked_for(
    error: Exception, told: str
) -> None:
    """It is told of others, while requests about them fail at once."""

    def request() -> None:
        raise error

    with pytest.raises(TransientStoreError) as raised:
        translated(request, "bucket", "net/b")
    assert str(raised.value) == told


def test_a_store_that_does_not_answer_is_told_with_what_to_check() -> None:
    error = StoreUnavailableError("no answer: Connection reset by peer")
    elsewhere = MountOptions(store="s3://bucket", endpoint_url="http://s3:443")
    assert unreachable(error, MountOptions(store="gs://bucket")) == f"{error}: check the network"
    assert unreachable(error, MountOptions(store="s3://bucket")).endswith(
        "; for a server of your own: --endpoint-url URL"
    )
    assert unreachable(error, elsewhere).endswith(" and --endpoint-url: http or https, host, port")
