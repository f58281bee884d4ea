"""Several stores as one: names, contents and links of each below a path of its own."""

from pathlib import Path

import pytest

from tests.support.parts import disk_tier, fill
from tests.support.stores import MemoryStore, Reticent, as_store
from trimsfs.errors import ObjectNotFoundError
from trimsfs.options import MountOptions
from trimsfs.options.store_settings import StoreTable
from trimsfs.origins import ByPath, Origins
from trimsfs.stores.base import Store
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.stores.open import open_store
from trimsfs.stores.router import StoreRouter
from trimsfs.tiers.quotas import Quotas
from trimsfs.types import Buffer, Generation

ONE, OTHER = "memory://one", "memory://other"


@pytest.fixture
def one() -> MemoryStore:
    return MemoryStore({"model": b"one", "d/x": b"x of one"}, identity=ONE)


@pytest.fixture
def other() -> MemoryStore:
    return MemoryStore({"model": b"the other", "e/f/y": b"y"}, identity=OTHER)


@pytest.fixture
def router(one: MemoryStore, other: MemoryStore) -> StoreRouter:
    return StoreRouter({"one/": as_store(one), "hub/deep/other/": as_store(other)})


async def names(router: StoreRouter, prefix: str) -> tuple[list[str], list[str]]:
    page = await router.list_page(prefix)
    assert page.next_token is None
    return [generation.key for generation in page.objects], list(page.prefixes)


async def content(router: Store, key: str) -> bytes:
    received = bytearray()

    def sink(piece: Buffer) -> None:
        received.extend(piece)

    generation = await router.stat(key)
    await router.read(generation, 0, generation.size, sink)
    return bytes(received)


async def test_each_store_is_below_its_path(router: StoreRouter) -> None:
    assert await names(router, "one/") == (["one/model"], ["one/d/"])
    assert await names(router, "one/d/") == (["one/d/x"], [])
    assert await names(router, "hub/deep/other/e/") == ([], ["hub/deep/other/e/f/"])
    assert await content(router, "one/model") == b"one"
    assert await content(router, "hub/deep/other/model") == b"the other"
    assert await content(router, "hub/deep/other/e/f/y") == b"y"


async def test_the_directories_above_the_paths_exist_without_a_request(
    router: StoreRouter, one: MemoryStore, other: MemoryStore
) -> None:
    assert await names(router, "") == ([], ["hub/", "one/"])
    assert await names(router, "hub/") == ([], ["hub/deep/"])
    assert await names(router, "hub/deep/") == ([], ["hub/deep/other/"])
    assert not (await router.list_page("elsewhere/")).exists
    assert not (await router.list_page("hub/de/")).exists
    for key in ("one", "hub", "onemodel", "elsewhere/model"):
        with pytest.raises(ObjectNotFoundError):
            await router.stat(key)
    assert one.requests == other.requests == []


async def test_the_path_of_an_empty_store_exists() -> None:
    router = StoreRouter({"one/": as_store(MemoryStore())})

    assert (await router.list_page("one/")).exists
    assert not (await router.list_page("one/d/")).exists


async def test_only_the_store_of_a_key_is_asked(router: StoreRouter, one: MemoryStore, other: MemoryStore) -> None:
    generation = await router.stat("one/d/x")
    await router.digest(generation)
    await router.list_page("one/d/", limit=5)

    assert [(request.method, request.key) for request in one.requests] == [
        ("stat", "d/x"),
        ("digest", "d/x"),
        ("list_page", "d/"),
    ]
    assert other.requests == []


async def test_pages_and_what_may_not_be_read_are_those_of_the_store() -> None:
    router = StoreRouter({"one/": as_store(Reticent({f"dir/{name}": b"" for name in "abc"}))})
    listed, token = list[str](), None
    for _ in range(3):
        page = await router.list_page("one/dir/", token=token, limit=1)
        listed += [generation.key for generation in page.objects]
        assert page.unreadable == ("one/dir/secret",)
        token = page.next_token
    assert (listed, token) == (["one/dir/a", "one/dir/b", "one/dir/c"], None)


async def test_links_of_a_directory_have_their_file_on_the_mount(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    router = StoreRouter({"d/": DirectoryStore(tmp_path)})

    link = await router.stat("d/link")

    assert (link.key, link.linked, link.file) == ("d/link", "d/file", "d/file")
    assert await content(router, "d/link") == b"content"
    assert router.links


async def test_a_content_is_called_as_by_a_mount_of_its_store_alone(router: StoreRouter, one: MemoryStore) -> None:
    assert (await router.stat("one/d/x")).token(router.origins) == one.generation("d/x").token(ONE)
    assert (await router.stat("one/model")).token(router.origins) != one.generation("model").token(OTHER)


async def test_what_a_mount_of_one_store_has_cached_stays_cached_beside_others(
    tmp_path: Path, router: StoreRouter, chunk_size: int
) -> None:
    """And the other way round: a store that a mount of its own has again."""
    body = bytes(range(256)) * (3 * chunk_size // 256)
    alone = disk_tier(tmp_path, store=ONE, chunk_size=chunk_size)
    before = await fill(alone, "d/x", body)
    await alone.residencies.pin(alone.blobs.known(before.token(ONE)) or pytest.fail("unknown"), True)
    await alone.aclose()

    beside = disk_tier(tmp_path, store=router.origins, chunk_size=chunk_size)
    (here,) = await beside.residencies.all()
    assert (here.generation.key, here.disk_bytes, here.pinned) == ("one/d/x", len(body), True)
    mounted = Generation(key="one/d/x", etag=before.etag, size=before.size, modified_ns=before.modified_ns)
    async with beside.blobs.using(mounted) as blob:
        assert blob.missing_bytes == 0
    await fill(beside, "one/new", body)
    await beside.aclose()

    again = disk_tier(tmp_path, store=ONE, chunk_size=chunk_size)
    assert [each.generation.key for each in await again.residencies.all()] == ["d/x", "new"]
    await again.aclose()


async def test_the_share_of_a_tenant_counts_by_the_names_of_the_mount(
    tmp_path: Path, router: StoreRouter, chunk_size: int
) -> None:
    body = bytes(2 * chunk_size)
    quotas = Quotas({"one/": 10 * chunk_size, "d/": 10 * chunk_size})
    for used in (0, len(body)):
        tier = disk_tier(tmp_path, store=router.origins, quotas=quotas, budget=30 * chunk_size, chunk_size=chunk_size)
        assert tier.statistics().tenant_used_bytes == {"one/": used, "d/": 0}, "of a store's own keys, not `d/x`"
        await fill(tier, "one/d/x", body)
        await tier.aclose()


def test_a_path_is_that_of_whole_names() -> None:
    paths = ByPath({"a/": 1, "a/b/": 2, "ab/": 3}, elsewhere=0)

    assert [paths.of(key) for key in ("a/x", "a/b/x", "ab/x", "a", "abc/x", "")] == [1, 2, 3, 0, 0, 0]
    assert paths.near("") == [1, 2, 3]
    assert paths.near("a/x") == [1]
    assert paths.near("a/") == [1, 2]
    with pytest.raises(KeyError):
        ByPath({"a/": 1}).of("b/x")
    assert ByPath({"": 5}).of("anything") == 5


def test_a_key_of_no_store_is_of_none() -> None:
    origins = Origins({"a/": (ONE, "a/")})

    assert origins.locate("a/x") == (ONE, "x")
    assert origins.name(ONE, "x") == "a/x"
    assert origins.locate("b/x") == ("", "b/x")
    assert origins.name("memory://gone", "x") == "x"


async def test_links_of_a_store_and_its_layout_are_below_its_path(tmp_path: Path) -> None:
    config = tmp_path / "models/org/m/config.json"
    config.parent.mkdir(parents=True)
    config.write_bytes(b"{}")
    table = StoreTable(path="hub", store=str(tmp_path / "models"), layout="hf-cache")
    store = open_store(MountOptions(stores=(table,)), max_requests=4)
    blobs = await store.list_page("hub/models--org--m/blobs/")
    (link,) = blobs.symlinks
    assert link.key.startswith("hub/models--org--m/blobs/")
    assert link.leads_to is not None
    assert await content(store, link.leads_to) == b"{}"
    await store.aclose()


@pytest.mark.parametrize(
    ("stores", "key", "linked", "now"),
    [
        ({"b/": "s"}, "b/x", "a/x", None),
        ({"a/": "s", "b/": "s"}, "b/x", None, "a/x"),
        ({"a/": "s", "b/": "s"}, "a/x", None, None),
        ({"a/": "s", "b/": "s"}, "b/x", "a/x", "a/x"),
        ({"0/": "s", "a/": "s", "b/": "s"}, "b/snapshots/x", "a/blobs/1", "0/blobs/1"),
        ({"a/": "other", "b/": "s"}, "b/x", "a/x", None),
        ({"b/": "s"}, "b/snapshots/x", "b/blobs/1", "b/blobs/1"),
        ({"b/": "s"}, "b/snapshots/x", "a/blobs/1", "a/blobs/1"),
        ({"b/": "s"}, "a/x", "a/y", "a/y"),
    ],
)
def test_a_link_of_an_earlier_server_leads_to_the_same_file_at_its_path_now(
    stores: dict[str, str], key: str, linked: str | None, now: str | None
) -> None:
    origins = Origins({path: (identity, path) for path, identity in stores.items()})
    assert origins.relinked(key, linked) == now
