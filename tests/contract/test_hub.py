"""The Hugging Face store against the fake hub: commits, digests, tokens, the CDN, and what its URLs name."""

import hashlib
import json
import random
import subprocess
import uuid
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import urllib3
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from tests.contract.backends import names, pages, read
from tests.contract.raw_server import drip, raw_server, respond, then
from tests.services import HOST
from tests.services.hub import TOKEN, Hub
from trimsfs.errors import (
    BucketNotFoundError,
    ConfigurationError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreThrottledError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.extras.stores.huggingface.hub import Hub as RealHub
from trimsfs.extras.stores.huggingface.repositories import parse
from trimsfs.options import MountOptions
from trimsfs.stores.base import Store
from trimsfs.stores.http.bodies import METADATA_THREADS
from trimsfs.stores.open import open_store
from trimsfs.stores.reach import reach
from trimsfs.stores.retrying import Retrying, RetryingStore

WEIGHTS = random.Random(4).randbytes(300_000)


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is neither a token nor a proxy."""
    monkeypatch.setenv("NO_PROXY", HOST)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")


@pytest.fixture
def owner() -> str:
    """An organisation of the test's own."""
    return f"org-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def model(hub: Hub, owner: str) -> str:
    """A repository with a small and a large file."""
    hub.put(f"model/{owner}/m", "config.json", b"{}")
    hub.put(f"model/{owner}/m", "model.safetensors", WEIGHTS)
    return f"{owner}/m"


def options(hub: Hub, url: str, **more: Any) -> MountOptions:
    return MountOptions(store=url, **{"endpoint_url": hub.endpoint} | more)


def git_id(content: bytes) -> str:
    """What git itself calls a file."""
    command = ["git", "hash-object", "--stdin"]
    return subprocess.run(command, input=content, capture_output=True, check=True).stdout.decode().strip()


def opened(hub: Hub, url: str, **more: Any) -> aclosing[Store]:
    return aclosing(open_store(options(hub, url, **more), max_requests=8))


def test_the_fake_hub_answers_huggingface_hub_itself(hub: Hub, model: str, tmp_path: Path) -> None:
    """So what the store is tested on is what the hub's own client takes for a hub."""
    hub.tag(f"model/{model}", "v1")
    api = HfApi(endpoint=hub.endpoint, token=False)
    commit = api.model_info(model, revision="v1", expand=["sha", "lastModified"]).sha
    refs = api.list_repo_refs(model).branches
    assert {(ref.name, ref.target_commit) for ref in refs} == {("main", commit), ("v1", commit)}
    listed = {entry.path: entry for entry in api.list_repo_tree(model, revision=commit)}
    assert listed == {entry.path: entry for entry in api.get_paths_info(model, list(listed), revision=commit)}
    config, weights = listed["config.json"], listed["model.safetensors"]
    assert isinstance(config, RepoFile)
    assert isinstance(weights, RepoFile)
    assert weights.lfs is not None
    assert (config.blob_id, weights.lfs.sha256) == (git_id(b"{}"), hashlib.sha256(WEIGHTS).hexdigest())
    for name, content in (("config.json", b"{}"), ("model.safetensors", WEIGHTS)):
        path = hf_hub_download(model, name, endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
        assert Path(path).read_bytes() == content
    api.auth_check(model)
    hub.restrict(f"model/{model}", "gated")
    with pytest.raises(GatedRepoError):
        api.auth_check(model)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(f"{model}-missing")


# Commits


@pytest.mark.promise("conditional ranged read", on="hub")
async def test_a_file_is_read_at_the_commit_that_it_was_found_at(hub: Hub, model: str) -> None:
    async with opened(hub, f"hf://{model}") as store:
        (config, weights) = (await store.list_page("")).objects
        hub.put(f"model/{model}", "model.safetensors", WEIGHTS[::-1])
        assert await read(store, weights) == WEIGHTS
        newest = await store.stat("model.safetensors")
        assert (newest.etag, newest.version_id) != (weights.etag, weights.version_id)
        assert await read(store, newest) == WEIGHTS[::-1]
        assert (await store.stat("config.json")).etag == config.etag  # another commit, the same content


async def test_pages_of_a_listing_are_of_one_commit_and_are_each_asked_for_once(hub: Hub, model: str) -> None:
    for number in range(5):
        hub.put(f"model/{model}", f"shards/{number}", b"old")
    async with opened(hub, f"hf://{model}") as store:
        hub.requests()
        page = await store.list_page("shards/", limit=2)
        hub.put(f"model/{model}", "shards/9", b"new")
        found = [page]
        while (token := found[-1].next_token) is not None:
            found.append(await store.list_page("shards/", token=token, limit=2))
        assert [name for page in found for name in names(page)] == [f"shards/{number}" for number in range(5)]
        assert len({generation.version_id for page in found for generation in page.objects}) == 1
        assert len(hub.requests()) == 1 + 3  # which commit it is, and each page
        assert len(await pages(store, "shards/")) == 1


async def test_a_commit_that_the_hub_has_dropped_is_read_at_the_newest_if_that_has_the_content(
    hub: Hub, model: str
) -> None:
    async with opened(hub, f"hf://{model}") as store:
        config, weights = (await store.list_page("")).objects
        assert config.version_id is not None
        hub.put(f"model/{model}", "model.safetensors", WEIGHTS[::-1])
        hub.drop(f"model/{model}", config.version_id)
        assert await read(store, config) == b"{}"
        with pytest.raises(ObjectChangedError, match=r"\Amodel.safetensors: [^\n]+\Z"):
            await read(store, weights)
    snapshot = f"models--{model.replace('/', '--')}/snapshots/{config.version_id}"
    async with opened(hub, f"hf://{model}", layout="hf-cache") as store:
        assert await read(store, replace(config, key=f"{snapshot}/config.json")) == b"{}"
        with pytest.raises(ObjectChangedError):
            await read(store, replace(weights, key=f"{snapshot}/model.safetensors"))


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "feature%2Fx", "COMMIT"])
async def test_the_url_names_a_revision(hub: Hub, model: str, revision: str) -> None:
    commit = hub.put(f"model/{model}", "config.json", b'{"v": 1}')
    if revision != "COMMIT":
        hub.tag(f"model/{model}", revision.replace("%2F", "/"))
    hub.put(f"model/{model}", "config.json", b'{"v": 2}')
    async with opened(hub, f"hf://{model}@{revision.replace('COMMIT', commit)}") as store:
        await store.probe()
        (config,) = (generation for generation in (await store.list_page("")).objects if generation.size < 100)
        assert await read(store, config) == b'{"v": 1}'
        assert config.version_id == commit
        if revision == "v1":
            hub.tag(f"model/{model}", "v1")  # moved
            assert await read(store, await store.stat("config.json")) == b'{"v": 2}'


async def test_mounts_of_other_revisions_are_other_stores(hub: Hub, model: str) -> None:
    urls = [f"hf://{model}", f"hf://{model}@main", f"hf://{model}@v1", f"hf://{model}/sub", f"hf://datasets/{model}"]
    assert len({open_store(options(hub, url), max_requests=1).identity for url in urls}) == len(urls) - 1


# Digests


@pytest.mark.parametrize("content", [b"", b"small", WEIGHTS])
@pytest.mark.promise("digest", on="hub")
async def test_the_hub_tells_digests_without_a_request(hub: Hub, model: str, content: bytes) -> None:
    hub.put(f"model/{model}", "file", content)
    async with opened(hub, f"hf://{model}") as store:
        generation = await store.stat("file")
        hub.requests()
        digest = await store.digest(generation, certain=True)
        assert digest is not None
        assert hub.requests() == []
        assert digest.binding
        assert digest.value.hex() == (hashlib.sha256(content).hexdigest() if len(content) > 1000 else git_id(content))


async def test_what_is_no_id_of_a_content_is_no_digest(hub: Hub, model: str) -> None:
    async with opened(hub, f"hf://{model}") as store:
        generation = await store.stat("config.json")
        for etag in ("x" * 40, "abc", "F" * 64):
            assert await store.digest(replace(generation, etag=etag)) is None


# Bytes


async def test_the_address_on_the_cdn_is_asked_for_once_and_again_when_it_has_expired(hub: Hub, model: str) -> None:
    async with opened(hub, f"hf://{model}") as store:
        weights = await store.stat("model.safetensors")
        hub.requests()
        for start in range(0, 300_000, 50_000):
            assert await read(store, weights, start, start + 50_000) == WEIGHTS[start : start + 50_000]
        asked = hub.requests()
        assert [line.split()[0] for line in asked] == ["GET", *["CDN"] * 6]
        hub.set("signature", random.randrange(1, 1 << 30))
        assert await read(store, weights, 7, 9) == WEIGHTS[7:9]
        assert [line.split()[0] for line in hub.requests()] == ["CDN", "GET", "CDN"]


async def test_a_small_file_that_comes_whole_is_cut_to_the_range(hub: Hub, model: str) -> None:
    content = bytes(range(250))
    hub.put(f"model/{model}", "vocab", content)
    hub.set("whole", True)
    try:
        async with opened(hub, f"hf://{model}") as store:
            assert await read(store, await store.stat("vocab"), 100, 200) == content[100:200]
    finally:
        hub.set("whole", False)


async def test_a_large_file_that_comes_whole_is_not_read_up_to_each_range(
    hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a CDN that ignores ranges."""
    monkeypatch.setattr("trimsfs.extras.stores.huggingface.hub.MOST_WHOLE", len(WEIGHTS) - 1)
    async with opened(hub, f"hf://{model}") as store:
        weights = await store.stat("model.safetensors")
        head = {"X-Repo-Commit": str(weights.version_id), "X-Linked-Size": str(weights.size)}
    async with (
        raw_server(respond("200 OK", WEIGHTS, headers=head)) as server,
        opened(hub, f"hf://{model}", endpoint_url=server.endpoint_url) as store,
    ):
        with pytest.raises(StoreUnavailableError, match="serves no ranges"):
            await read(store, weights, 100_000, 200_000)
        assert await read(store, weights) == WEIGHTS


async def test_another_content_at_the_commit_is_noticed(hub: Hub, model: str) -> None:
    """As of a proxy that serves something else."""
    async with opened(hub, f"hf://{model}") as store:
        for key in ("config.json", "model.safetensors"):
            generation = await store.stat(key)
            with pytest.raises(ObjectChangedError, match=rf"\A{key}: its ETag is now"):
                await read(store, replace(generation, etag="0" * len(generation.etag)), 0, 1)
        weights = await store.stat("model.safetensors")
        with pytest.raises(ObjectChangedError, match="its size is now 300000"):
            await read(store, replace(weights, size=299_999), 0, 1)


# Access


@pytest.mark.promise("credentials", on="hub")
async def test_a_private_repository_needs_the_token_which_the_cdn_never_sees(
    hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.restrict(f"model/{model}", "private")
    async with opened(hub, f"hf://{model}") as store:
        with pytest.raises(BucketNotFoundError, match="does not exist: check the spelling, or set HF_TOKEN"):
            await store.probe()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    async with opened(hub, f"hf://{model}") as store:
        await store.probe()
        assert await read(store, await store.stat("model.safetensors")) == WEIGHTS
    async with opened(hub, f"hf://{model}", anonymous=True) as store:
        with pytest.raises(BucketNotFoundError):
            await store.probe()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    async with opened(hub, f"hf://{model}") as store:
        with pytest.raises(StoreAccessError, match=r"Invalid credentials.*: HF_TOKEN is not accepted: renew it"):
            await store.probe()


@pytest.mark.parametrize(
    ("access", "token", "remedy"),
    [
        ("gated", "", "gated: accept its terms at {url} and set HF_TOKEN, or run `hf auth login`"),
        ("gated, not granted", TOKEN, "gated: accept its terms at {url} with the account of the token"),
    ],
)
async def test_a_gated_repository_names_the_remedy_before_it_is_mounted(
    hub: Hub, model: str, access: str, token: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = None
    async with opened(hub, f"hf://{model}") as store:
        weights = await store.stat("model.safetensors")
    hub.restrict(f"model/{model}", access)
    monkeypatch.setenv("HF_TOKEN", token)
    async with opened(hub, f"hf://{model}") as store:
        with pytest.raises(StoreAccessError) as caught:
            await reach(store, options(hub, f"hf://{model}"), deadline_s=1)
        assert str(caught.value) == f"hf://{model}: " + remedy.format(url=f"{hub.endpoint}/{model}")
        with pytest.raises(StoreAccessError, match="gated"):
            await read(store, weights, 0, 1)


async def test_a_hub_that_throttles_is_asked_again_by_the_common_wrapper_only(hub: Hub, model: str) -> None:
    async with opened(hub, f"hf://{model}") as store:
        hub.requests()
        hub.set("throttled", 1)
        with pytest.raises(StoreThrottledError, match="rate limited"):
            await store.stat("config.json")
        assert len(hub.requests()) == 1
        hub.set("throttled", 2)
        failures: list[Exception] = []
        retrying = RetryingStore(store, Retrying(deadline_s=30, on_failure=failures.append))
        assert (await retrying.stat("config.json")).size == 2
        assert len(failures) == 2


async def test_a_revision_that_does_not_exist_is_told(hub: Hub, model: str) -> None:
    async with opened(hub, f"hf://{model}@nowhere") as store:
        with pytest.raises(BucketNotFoundError, match=rf"hf://{model}: this revision does not exist.*nowhere"):
            await store.probe()


async def test_an_answer_without_an_end_is_not_taken_in(hub: Hub, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.extras.stores.huggingface.hub.MOST_JSON", 50)
    async with opened(hub, f"hf://{model}") as store:
        with pytest.raises(TransientStoreError, match="answer larger than"):
            await store.list_page("")


HEAD = respond("200 OK", json.dumps({"sha": "a" * 40}).encode())


@pytest.mark.parametrize("dripping", ["200 OK", "307 Temporary Redirect"])
async def test_answers_that_drip_in_do_not_use_up_the_threads(hub: Hub, dripping: str) -> None:
    """As many as there are threads, one after the other; then the hub is well again."""
    drops = then(respond(dripping, length=1000, headers={"Location": "/x"}), drip(b" ", times=1000))
    async with (
        raw_server(*[drops] * METADATA_THREADS, HEAD, respond("200 OK", b"[]")) as server,
        opened(hub, "hf://org/m", endpoint_url=server.endpoint_url, stall_timeout=0.5) as store,
    ):
        async with trio.open_nursery() as nursery:
            for _ in range(METADATA_THREADS):
                nursery.start_soon(fails, store)
        with trio.fail_after(10):
            while True:
                with suppress(TransientStoreError):
                    assert (await store.list_page("")).objects == ()
                    return


@pytest.mark.parametrize(
    ("head", "tree"),
    [
        (b"[]", b"[]"),
        (b'{"sha": "a", "lastModified": 1}', b"[]"),
        (None, b'[{"type": "file", "path": "f", "size": 1, "oid": "x", "lfs": "text"}]'),
        (None, b'[{"type": "file", "path": "f", "size": 1e999, "oid": "x"}]'),
        (None, b"[" * 100_000),
        (None, b"<html>"),
    ],
    ids=["a list", "a time", "lfs", "size", "nested", "page"],
)
async def test_an_answer_that_is_not_a_hubs_is_an_error_of_ours(hub: Hub, head: bytes | None, tree: bytes) -> None:
    """The circuit breaker's probe is prepared for no other."""
    async with (
        raw_server(HEAD if head is None else respond("200 OK", head), respond("200 OK", tree)) as server,
        opened(hub, "hf://org/m", endpoint_url=server.endpoint_url) as store,
    ):
        with pytest.raises(StoreUnavailableError, match="hf://org/m@main: the answer is not from a"):
            await store.list_page("")


async def fails(store: Store) -> None:
    with pytest.raises(TransientStoreError):
        await store.list_page("")


async def test_what_is_no_hub_is_told(hub: Hub, model: str) -> None:
    async with opened(hub, f"hf://{model}", endpoint_url=f"{hub.endpoint}/elsewhere") as store:
        with pytest.raises(BucketNotFoundError, match="does not exist: check the spelling, and HF_ENDPOINT"):
            await store.probe()


def test_a_hub_behind_tls_does_not_lead_to_addresses_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(*_arguments: object, **_named: object) -> urllib3.HTTPResponse:
        return urllib3.HTTPResponse(status=302, headers={"location": "http://example.org/x"}, preload_content=False)

    monkeypatch.setattr(urllib3.PoolManager, "request", redirect)
    made = RealHub(MountOptions(endpoint_url="https://hub.example.org"), connections=1)
    with pytest.raises(StoreUnavailableError, match="without TLS"):
        made.ask(None, "models", {})


def test_an_endpoint_with_credentials_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of the environment."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://user:SECRET@hub.example")
    with pytest.raises(ConfigurationError, match=r"endpoint URL .*: write https://HOST") as caught:
        open_store(MountOptions(store="hf://org/m"), max_requests=1)
    assert "SECRET" not in str(caught.value)


# What URLs name


async def test_a_url_may_name_a_dataset_and_a_directory(hub: Hub, owner: str) -> None:
    hub.put(f"dataset/{owner}/d", "data/train/0.parquet", WEIGHTS)
    async with opened(hub, f"hf://datasets/{owner}/d/data") as store:
        await store.probe()
        assert names(await store.list_page("")) == ["train/"]
        assert await read(store, await store.stat("train/0.parquet")) == WEIGHTS


async def test_a_url_may_name_an_organisation(hub: Hub, model: str, owner: str) -> None:
    hub.put(f"model/{owner}/n", "config.json", b"{}")
    async with opened(hub, f"hf://{owner}") as store:
        await store.probe()
        assert [name for page in await pages(store, limit=1) for name in names(page)] == ["m/", "n/"]
        assert names(await store.list_page("m/")) == ["m/config.json", "m/model.safetensors"]
        assert await read(store, await store.stat("m/model.safetensors")) == WEIGHTS
        assert not (await store.list_page("missing/", limit=1)).exists
        for key in ("missing/config.json", "m", "m/none"):
            with pytest.raises(ObjectNotFoundError):
                await store.stat(key)


async def test_a_url_may_name_several_repositories(hub: Hub, model: str, owner: str) -> None:
    hub.put(f"dataset/{owner}/d", "a", b"a")
    hub.tag(f"model/{model}", "v1")
    hub.put(f"model/{model}", "config.json", b"{1}")
    async with opened(hub, f"hf://{model}@v1,datasets/{owner}/d") as store:
        await store.probe()
        assert names(await store.list_page("")) == ["datasets/", f"{owner}/"]
        assert names(await store.list_page(f"{owner}/")) == [f"{model}/"]
        assert names(await store.list_page(f"datasets/{owner}/d/")) == [f"datasets/{owner}/d/a"]
        assert await read(store, await store.stat(f"{model}/config.json")) == b"{}"
        assert not (await store.list_page(f"{owner}/other/")).exists


@pytest.mark.parametrize(
    "url", ["hf://", "hf:///", "hf://a/b@", "hf://a/b@v1,", "hf://a b/c", "hf://a/b,c/d/e", "hf://a/b@v1,a/b@v2"]
)
def test_a_url_that_names_no_repository_is_told(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\Astore hf://[^\n]+\Z"):
        parse(url)
