"""The layout of a Hugging Face cache over a directory and over the fake hub, as huggingface_hub itself reads one."""

import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.contract.backends import Backend, DirectoryBackend, S3Backend, names, pages, read
from tests.services import HOST
from tests.services.hub import Hub
from tests.support.versions import in_directory, move, publish, write_files
from trimsfs.errors import ObjectNotFoundError
from trimsfs.options import MountOptions
from trimsfs.stores.base import Store
from trimsfs.stores.layouts.hf_cache import HfCacheStore
from trimsfs.stores.open import open_store
from trimsfs.types import Generation

WEIGHTS = os.urandom(200_000)


class Owner:
    """An organisation in a directory or on the hub."""

    def __init__(self, put: Callable[[str, bytes], object], name: str, options: MountOptions) -> None:
        self.put = put
        self.name = name
        self.options = options
        put("m/config.json", b"{}")
        put("m/model.safetensors", WEIGHTS)
        put("m/sub/vocab", b"words")
        put("n--two/config.json", b"{2}")


@pytest.fixture(autouse=True)
def _directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", HOST)


@pytest.fixture(params=["directory", "hub"])
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Owner:
    name = f"org-{uuid.uuid4().hex[:12]}"
    if request.param == "directory":
        (tmp_path / "root").mkdir()
        directory = DirectoryBackend(tmp_path / "root")
        options = MountOptions(store=str(tmp_path / "root"), layout="hf-cache")
        return Owner(lambda key, content: directory.put(f"{name}/{key}", content), name, options)
    hub: Hub = request.getfixturevalue("hub")

    def put(key: str, content: bytes) -> None:
        repository, _, path = key.partition("/")
        hub.put(f"model/{name}/{repository}", path, content)

    return Owner(put, name, MountOptions(store=f"hf://{name}", endpoint_url=hub.endpoint, layout="hf-cache"))


@pytest.fixture
async def store(owner: Owner) -> AsyncIterator[Store]:
    store = open_store(owner.options, max_requests=8)
    yield store
    await store.aclose()


async def commit_of(store: Store, folder: str) -> str:
    (main,) = (await store.list_page(f"{folder}/refs/")).objects
    content = (await read(store, main)).decode()
    assert await store.stat(main.key) == main
    assert main.size == len(content) == 40
    return content


async def test_repositories_are_folders_with_refs_snapshots_and_blobs(owner: Owner, store: Store) -> None:
    folder = f"models--{owner.name}--m"
    await store.probe()
    assert names(await store.list_page("")) == [f"{folder}/", f"models--{owner.name}--n--two/"]
    assert names(await store.list_page(f"{folder}/")) == [
        f"{folder}/{name}/" for name in ("blobs", "refs", "snapshots")
    ]
    commit = await commit_of(store, folder)
    snapshot = f"{folder}/snapshots/{commit}/"
    assert names(await store.list_page(f"{folder}/snapshots/")) == [snapshot]
    top = await store.list_page(snapshot)
    assert names(top) == [f"{snapshot}config.json", f"{snapshot}model.safetensors", f"{snapshot}sub/"]
    assert await read(store, top.objects[1], 5, 100_000) == WEIGHTS[5:100_000]
    vocab = await store.stat(f"{snapshot}sub/vocab")
    assert (await store.list_page(f"{snapshot}sub/")).objects == (vocab,)
    assert await read(store, vocab) == b"words"


async def test_blobs_are_links_to_the_files_of_the_snapshot(owner: Owner, store: Store) -> None:
    folder = f"models--{owner.name}--m"
    snapshot = f"{folder}/snapshots/{await commit_of(store, folder)}"
    page = await store.list_page(f"{folder}/blobs/")
    assert (page.objects, page.prefixes) == ((), ())
    assert {link.leads_to for link in page.symlinks} == {
        f"{snapshot}/{path}" for path in ("config.json", "model.safetensors", "sub/vocab")
    }
    for link in page.symlinks:
        assert (await store.list_page(f"{link.key}/", limit=1)).symlink == link
        with pytest.raises(ObjectNotFoundError):
            await store.stat(link.key)
        assert link.leads_to is not None
        assert (await store.stat(link.leads_to)).linked == link.key  # by which commits share contents


async def test_a_commit_has_exactly_its_files_whatever_is_put_later(owner: Owner, store: Store) -> None:
    """On the hub, the old commit stays whole; else it is gone, but never has another file."""
    folder = f"models--{owner.name}--m"
    old = await commit_of(store, folder)
    before = {generation.key: generation for generation in await files(store, f"{folder}/snapshots/{old}/")}
    owner.put("m/config.json", b"{new}")
    new = await commit_of(store, folder)
    assert new != old
    after = await files(store, f"{folder}/snapshots/{old}/")
    on_hub = "hf://" in str(owner.options.store)
    assert after == (list(before.values()) if on_hub else [])
    listed = names(await store.list_page(f"{folder}/snapshots/"))
    assert sorted(listed) == sorted(f"{folder}/snapshots/{commit}/" for commit in ((new, old) if on_hub else (new,)))
    assert await read(store, await store.stat(f"{folder}/snapshots/{new}/config.json")) == b"{new}"
    if on_hub:
        assert await read(store, before[f"{folder}/snapshots/{old}/config.json"]) == b"{}"
    # What both commits have is one file on disk and in memory.
    weights = [before[f"{folder}/snapshots/{old}/model.safetensors"]]
    weights.append(await store.stat(f"{folder}/snapshots/{new}/model.safetensors"))
    assert len({generation.token("store") for generation in weights}) == 1


async def files(store: Store, prefix: str) -> list[Generation]:
    page = await store.list_page(prefix)
    return [*page.objects, *[file for below in page.prefixes for file in await files(store, below)]]


async def test_signed_files_are_not_shared_between_commits(owner: Owner) -> None:
    store = open_store(
        owner.options.model_copy(update={"signatures": "check", "signing_key": Path("key.pem")}), max_requests=8
    )
    folder = f"models--{owner.name}--m"
    snapshot = f"{folder}/snapshots/{await commit_of(store, folder)}"
    assert (await store.stat(f"{snapshot}/config.json")).linked is None
    await store.aclose()


@pytest.mark.parametrize(
    "prefix",
    [
        *("models--none--m/", "models--none--m/refs/", "models--/", "other/", "models--ORG--m/other/"),
        *("models--ORG--m/snapshots/main/", f"models--ORG--m/snapshots/{'0' * 40}/", "models--ORG--m/refs/main/"),
    ],
)
async def test_what_is_not_there_is_empty(owner: Owner, store: Store, prefix: str) -> None:
    prefix = prefix.replace("ORG", owner.name)
    assert not (await store.list_page(prefix, limit=1)).exists
    with pytest.raises(ObjectNotFoundError):
        await store.stat(f"{prefix}file")


@pytest.mark.parametrize("limit", [1, 2])
async def test_pages_give_each_name_once(owner: Owner, store: Store, limit: int) -> None:
    folder = f"models--{owner.name}--m"
    snapshot = f"{folder}/snapshots/{await commit_of(store, folder)}/"
    for prefix in ("", f"{folder}/", snapshot, f"{folder}/blobs/"):
        whole = await store.list_page(prefix)
        found = await pages(store, prefix, limit=limit)
        assert all(len(page) <= limit for page in found)
        assert [name for page in found for name in names(page)] == names(whole)
        assert [link for page in found for link in page.symlinks] == list(whole.symlinks)


async def test_digests_are_those_of_the_store_below(owner: Owner, store: Store) -> None:
    folder = f"models--{owner.name}--m"
    snapshot = f"{folder}/snapshots/{await commit_of(store, folder)}"
    digest = await store.digest(await store.stat(f"{snapshot}/model.safetensors"))
    assert (digest is not None) == ("hf://" in str(owner.options.store))
    (main,) = (await store.list_page(f"{folder}/refs/")).objects
    assert await store.digest(main) is None


async def test_a_revision_of_the_url_is_main_and_other_branches_are_there_too(hub: Hub) -> None:
    name = f"org-{uuid.uuid4().hex[:12]}/m"
    first = hub.put(f"model/{name}", "config.json", b"1")
    hub.tag(f"model/{name}", "v1")
    second = hub.put(f"model/{name}", "config.json", b"2")
    hub.tag(f"model/{name}", "feature/x")
    hub.put(f"dataset/{name}", "data", b"d")
    url = f"hf://{name}@v1,datasets/{name}"
    store = open_store(MountOptions(store=url, endpoint_url=hub.endpoint, layout="hf-cache"), max_requests=8)
    folder = f"models--{name.replace('/', '--')}"
    assert names(await store.list_page("")) == [f"datasets{folder.removeprefix('models')}/", f"{folder}/"]
    refs = {name: await read(store, await store.stat(f"{folder}/refs/{name}")) for name in ("main", "v1", "feature/x")}
    assert refs == {"main": first.encode(), "v1": first.encode(), "feature/x": second.encode()}
    assert names(await store.list_page(f"{folder}/refs/")) == [f"{folder}/refs/{x}" for x in ("main", "v1", "feature/")]
    await store.aclose()


async def test_keys_that_lead_out_of_a_repository_are_not_in_it(s3: S3Backend) -> None:
    """Who may write to a bucket makes no link out of the mount."""
    for key in ("org/m/config.json", "org/m/../../../etc/passwd", "org/m/./x", "org/m//y", "../z/config.json"):
        s3.put(key, b"{}")
    inner = s3.open()
    store = HfCacheStore(inner, None, share_links=True)
    folder = "models--org--m"
    assert names(await store.list_page("")) == [f"{folder}/"]
    snapshot = f"{folder}/snapshots/{await commit_of(store, folder)}/"
    assert names(await store.list_page(snapshot)) == [f"{snapshot}config.json"]
    links = (await store.list_page(f"{folder}/blobs/")).symlinks
    assert [link.leads_to for link in links] == [f"{snapshot}config.json"]
    await store.aclose()


async def test_a_model_takes_few_requests_to_be_found(hub: Hub) -> None:
    """One after the other, they are the time that a program waits before the first byte."""
    name = f"org-{uuid.uuid4().hex[:12]}/m"
    commit = hub.put(f"model/{name}", "config.json", b"1")
    folder = f"models--{name.replace('/', '--')}"
    store = open_store(MountOptions(store=f"hf://{name}", endpoint_url=hub.endpoint, layout="hf-cache"), max_requests=8)
    hub.requests()
    for prefix in ("", f"{folder}/", f"{folder}/refs/", f"{folder}/snapshots/", f"{folder}/snapshots/{commit}/"):
        assert (await store.list_page(prefix)).exists
    calls = [line.split()[1].removeprefix(f"/api/models/{name}/") for line in hub.requests()]
    assert calls == ["refs", "refs", "refs", f"revision/{commit}", f"tree/{commit}"]
    assert (await store.list_page(f"{folder}/snapshots/{commit}/")).exists
    assert hub.requests() == []  # a commit does not change
    await store.aclose()


async def test_a_repository_may_have_no_owner(tmp_path: Path) -> None:
    backend: Backend = DirectoryBackend(tmp_path / "root")
    (tmp_path / "root").mkdir()
    backend.put("gpt2/config.json", b"{}")
    backend.put("gpt2/onnx/model.onnx", b"o")
    backend.put("datasets/org/d/data", b"d")
    store = open_store(MountOptions(store=str(tmp_path / "root"), layout="hf-cache"), max_requests=8)
    assert isinstance(store, HfCacheStore)
    assert names(await store.list_page("")) == ["datasets--org--d/", "models--gpt2/"]
    snapshot = f"models--gpt2/snapshots/{await commit_of(store, 'models--gpt2')}/"
    assert names(await store.list_page(snapshot)) == [f"{snapshot}config.json", f"{snapshot}onnx/"]


async def test_versions_of_a_model_are_repositories_once_they_are_published(tmp_path: Path) -> None:
    put = in_directory(tmp_path)
    publish(put, "llama", "v1", {"config.json": b"{1}", "model.safetensors": WEIGHTS})
    publish(put, "org/llama", "v1", {"config.json": b"{1}"})
    for model in ("llama", "org/llama"):
        write_files(put, model, "v2", {"config.json": b"{2}"})
        move(put, model, "prod", "v1")
    store = open_store(MountOptions(store=str(tmp_path), layout="hf-cache"), max_requests=8)
    assert names(await store.list_page("")) == ["models--llama--v1/", "models--org--llama/"]
    assert not (await store.list_page("models--llama--v2/")).exists
    snapshot = f"models--llama--v1/snapshots/{await commit_of(store, 'models--llama--v1')}/"
    assert names(await store.list_page(snapshot)) == [f"{snapshot}config.json", f"{snapshot}model.safetensors"]
    digest = await store.digest(await store.stat(f"{snapshot}model.safetensors"))
    assert digest is not None  # of the manifest: a directory has none
    assert digest.value == hashlib.sha256(WEIGHTS).digest()
    snapshot = f"models--org--llama/snapshots/{await commit_of(store, 'models--org--llama')}/"
    assert names(await store.list_page(snapshot)) == [f"{snapshot}v1/"]
    await store.aclose()
