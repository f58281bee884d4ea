"""Versions in a store: what a mount shows of them, and what a store without them pays."""

import hashlib

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore, as_store
from tests.support.versions import in_memory, move, publish, remove, write_files
from trimsfs.errors import ObjectNotFoundError, StoreAccessError, StoreUnavailableError
from trimsfs.formats.version_records import DIRECTORY
from trimsfs.stores.base import PAGE_LIMIT, Page
from trimsfs.stores.digests import Digest
from trimsfs.stores.layouts import version_manifests
from trimsfs.stores.layouts import versioned as versions
from trimsfs.stores.layouts.versioned import VersionedStore
from trimsfs.types import Symlink

FILES = {"config.json": b"{}", "weights/a": b"a" * 100}
ROUND_TRIP_S = 1.0


@pytest.fixture
def store() -> MemoryStore:
    """A model with two versions, one of them unfinished, and one without versions."""
    store = MemoryStore({"plain/a": b"a", "plain/below/b": b"b"})
    put = in_memory(store)
    publish(put, "m", "v1", FILES)
    write_files(put, "m", "v2", FILES)
    move(put, "m", "prod", "v1")
    return store


def versioned(store: MemoryStore) -> VersionedStore:
    return VersionedStore(as_store(store))


def names(page: Page) -> list[str]:
    """All that a page shows."""
    found = [*(each.key for each in page.objects), *page.prefixes, *(f"{each.key}@" for each in page.symlinks)]
    return sorted(found)


async def probe(store: VersionedStore, prefix: str) -> Page:
    """What the namespace asks of a directory that is in no listing it knows."""
    return await store.list_page(prefix, limit=1)


async def test_a_version_is_there_once_its_manifest_is(store: MemoryStore) -> None:
    shown = versioned(store)
    page = await shown.list_page("m/")
    assert names(page) == ["m/prod@", "m/v1/"]
    assert page.symlinks == (Symlink(key="m/prod", target="v1"),)
    assert not (await probe(shown, "m/v2/")).exists
    publish(in_memory(store), "m", "v2", FILES)
    assert (await probe(shown, "m/v2/")).exists
    assert names(await shown.list_page("m/")) == ["m/prod@", "m/v1/", "m/v2/"]
    assert names(await shown.list_page("m/v2/")) == ["m/v2/config.json", "m/v2/weights/"]


async def test_the_first_version_of_a_model_is_not_seen_before_its_manifest_either(store: MemoryStore) -> None:
    shown = versioned(store)
    assert not (await probe(shown, "new/v1/")).exists  # and so nothing is remembered that would show it later
    put = in_memory(store)
    put(f"new/{DIRECTORY}/uploads/v1.json", b"any object there says that this is a model with versions")
    write_files(put, "new", "v1", FILES)
    assert not (await probe(shown, "new/v1/")).exists
    page = await shown.list_page("new/")
    assert names(page) == []
    assert page.exists


async def test_the_first_push_of_a_model_is_not_seen_between_two_answers(store: MemoryStore) -> None:
    """The model is asked about before the push begins, its directory listed after the first file."""
    shown = versioned(store)
    listing = store.block(method="list_page", key="new/v1/")
    found = list[Page]()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            found.append(await probe(shown, "new/v1/"))

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        store.put(f"new/{DIRECTORY}/pushes/v1.json", b"the reservation")
        write_files(in_memory(store), "new", "v1", FILES)
        listing.set()
    assert not found[0].exists


async def test_the_first_push_of_a_model_is_not_seen_between_two_pages(store: MemoryStore) -> None:
    """The names of the first page sort behind what tells that the model has versions."""
    for name in ("a1", "a2", "a3"):
        store.put(f"new/{name}", b"x")
    shown = versioned(store)
    page = await shown.list_page("new/", limit=2)
    store.put(f"new/{DIRECTORY}/pushes/v1.json", b"the reservation")
    write_files(in_memory(store), "new", "v1", FILES)
    pages, token = [page], page.next_token
    for _ in range(3):
        if token is None:
            break
        pages.append(await shown.list_page("new/", token=token, limit=1))
        token = pages[-1].next_token
    assert [name for each in pages for name in names(each)] == ["new/a1", "new/a2", "new/a3"]


async def test_what_describes_versions_is_not_shown(store: MemoryStore) -> None:
    shown = versioned(store)
    for prefix in (f"m/{DIRECTORY}/", f"m/{DIRECTORY}/aliases/"):
        assert not (await shown.list_page(prefix)).exists
    with pytest.raises(ObjectNotFoundError):
        await shown.stat(f"m/{DIRECTORY}/v1.json")
    assert (await probe(shown, "m/")).exists
    assert f"m/{DIRECTORY}/" not in names(await probe(shown, "m/"))


async def test_a_removed_version_is_not_found(store: MemoryStore) -> None:
    shown = versioned(store)
    assert (await probe(shown, "m/v1/")).exists
    remove(in_memory(store), "m", "v1")
    assert not (await probe(shown, "m/v1/")).exists
    assert names(await shown.list_page("m/")) == ["m/prod@"]
    assert names(await shown.list_page("m/v1/")) == ["m/v1/config.json", "m/v1/weights/"]  # to who is in it


async def test_an_alias_is_a_link_that_moves_with_one_put(store: MemoryStore) -> None:
    shown, put = versioned(store), in_memory(store)
    assert (await probe(shown, "m/prod/")).symlink == Symlink(key="m/prod", target="v1")
    move(put, "m", "prod", "v2")
    assert (await probe(shown, "m/prod/")).symlink == Symlink(key="m/prod", target="v2")
    store.requests.clear()
    assert (await probe(shown, "m/prod/")).symlink == Symlink(key="m/prod", target="v2")
    with pytest.raises(ObjectNotFoundError):
        await shown.stat("m/prod")
    assert [request.method for request in store.requests] == ["stat"]
    store.delete(f"m/{DIRECTORY}/aliases/prod.json")
    page = await probe(shown, "m/prod/")
    assert (page.exists, page.symlink) == (False, None)


async def test_an_alias_that_moves_while_it_is_read_is_read_again(store: MemoryStore) -> None:
    shown = versioned(store)
    gate = store.block(method="read", times=1)
    found = list[Page]()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            found.append(await probe(shown, "m/prod/"))

        nursery.start_soon(run)
        await store.arrived(1)
        move(in_memory(store), "m", "prod", "v2")
        gate.set()
    assert found[0].symlink == Symlink(key="m/prod", target="v2")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 2, "version": "v1"}', b"x" * 100_000])
async def test_an_invalid_alias_is_not_shown(
    store: MemoryStore, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(f"m/{DIRECTORY}/aliases/prod.json", content)
    shown = versioned(store)
    assert names(await shown.list_page("m/")) == ["m/v1/"]
    assert (await probe(shown, "m/prod/")).symlink is None
    assert len(caplog.records) == 1
    assert "not an alias, so it is not shown" in caplog.text
    caplog.clear()


async def test_versions_at_the_root_of_a_mount(store: MemoryStore) -> None:
    root = MemoryStore()
    for key, content in store.contents.items():
        if key[0].startswith("m/"):
            root.put(key[0].removeprefix("m/"), content)
    shown = versioned(root)
    assert names(await shown.list_page("")) == ["prod@", "v1/"]
    assert not (await probe(shown, "v2/")).exists
    assert (await shown.list_page("", limit=1)).exists
    digest = await shown.digest(root.generation("v1/config.json"))
    assert digest is not None
    assert digest.value == hashlib.sha256(b"{}").digest()


async def test_a_listing_of_several_pages_shows_versions_and_each_alias_once(store: MemoryStore) -> None:
    put = in_memory(store)
    for number in range(PAGE_LIMIT):
        write_files(put, "m", f"u{number:04}", {"a": b"a"})
    store.put("m/!first", b"sorts before the directory that tells that these are versions")
    shown = versioned(store)
    found, token = list[str](), None
    for _ in range(3):
        page = await shown.list_page("m/", token=token, limit=600)
        found += names(page)
        token = page.next_token
        if token is None:
            break
    assert found == ["m/!first", "m/prod@", "m/v1/"]


async def test_a_first_page_that_does_not_tell_is_asked_about(store: MemoryStore) -> None:
    for number in range(5):
        store.put(f"m/!{number}", b"x")
    shown = versioned(store)
    page = await shown.list_page("m/", limit=2)
    assert names(page) == ["m/!0", "m/!1", "m/prod@"]
    rest = await shown.list_page("m/", token=page.next_token)
    assert names(rest) == ["m/!2", "m/!3", "m/!4", "m/v1/"]


async def test_files_and_listings_without_versions_wait_for_no_request_after_another(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    store.delay(ROUND_TRIP_S)
    file = store.generation("plain/below/b")
    for ask, round_trips in (
        (lambda: versioned(store).list_page("plain/"), 1),
        (lambda: versioned(store).stat("plain/a"), 1),
        (lambda: versioned(store).digest(file), 1),
        (lambda: probe(versioned(store), "plain/a/"), 1),
        (lambda: probe(versioned(store), "plain/below/"), 2),
    ):
        began = trio.current_time()
        await ask()
        assert trio.current_time() - began == round_trips * ROUND_TRIP_S


async def test_what_is_known_of_a_directory_is_not_asked_for_digests(store: MemoryStore) -> None:
    shown = versioned(store)
    for prefix in ("", "plain/"):
        await shown.list_page(prefix)
    store.requests.clear()
    assert await shown.digest(store.generation("plain/below/b")) is None
    assert [request.method for request in store.requests] == ["digest"]


async def test_files_of_a_version_have_the_digest_of_its_manifest(store: MemoryStore) -> None:
    shown = versioned(store)
    store.digests["m/v1/config.json"] = Digest(algorithm="md5", value=b"another")
    for path, content in FILES.items():
        digest = await shown.digest(store.generation(f"m/v1/{path}"))
        assert digest == Digest(algorithm="sha256", value=hashlib.sha256(content).digest())
        assert digest.binding
    assert store.reads(f"m/{DIRECTORY}/v1.json") == [0]


async def test_other_files_have_the_digest_of_the_store(store: MemoryStore) -> None:
    shown = versioned(store)
    told = Digest(algorithm="md5", value=b"as the store says")
    for key in ("m/v1/later", "m/readme", "plain/a", "m/v2/config.json"):
        store.put(key, b"{}")
        store.digests[key] = told
        assert await shown.digest(store.generation(key)) == told, key


async def test_what_describes_versions_is_read_up_to_a_limit(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "MOST_FILES", 2 * PAGE_LIMIT)
    for number in range(10 * PAGE_LIMIT):
        store.put(f"m/{DIRECTORY}/{number}.json", b"")
    with pytest.raises(StoreUnavailableError, match="over 2000 objects"):
        await versioned(store).list_page("m/")
    assert store.count("list_page", f"m/{DIRECTORY}/") <= 3


async def test_many_aliases_are_read_some_at_a_time(store: MemoryStore) -> None:
    for number in range(4 * versions.ALIASES_AT_ONCE):
        move(in_memory(store), "m", f"alias{number}", "v1")
    shown = versioned(store)
    store.delay(0.01, method="read")
    assert len((await shown.list_page("m/")).symlinks) == 4 * versions.ALIASES_AT_ONCE + 1
    assert store.most_under_way <= versions.ALIASES_AT_ONCE


async def test_the_digests_that_are_remembered_take_bounded_memory(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = store.generation(f"m/{DIRECTORY}/v1.json").size
    monkeypatch.setattr(version_manifests, "MOST_DIGESTS_BYTES", 3 * (1000 + size))
    shown = versioned(store)
    for number in range(1, 10):
        publish(in_memory(store), "m", f"v{number}", FILES)
        assert await shown.digest(store.generation(f"m/v{number}/config.json")) is not None
    asked = store.count("read")
    for number in (9, 8, 1):
        await shown.digest(store.generation(f"m/v{number}/config.json"))
    assert store.count("read") == asked + 1


async def test_a_version_that_is_published_anew_has_its_new_digests(
    store: MemoryStore, autojump_clock: MockClock
) -> None:
    shown = versioned(store)
    await shown.digest(store.generation("m/v1/config.json"))
    publish(in_memory(store), "m", "v1", {"config.json": b"other"})
    await trio.sleep(2)
    digest = await shown.digest(store.generation("m/v1/config.json"))
    assert digest is not None
    assert digest.value == hashlib.sha256(b"other").digest()


async def test_a_manifest_that_is_slow_holds_up_no_other(store: MemoryStore, autojump_clock: MockClock) -> None:
    publish(in_memory(store), "n", "v1", FILES)
    shown = versioned(store)
    for model in ("m/", "n/"):
        await shown.list_page(model)
    store.delay(ROUND_TRIP_S, method="stat", key=f"m/{DIRECTORY}/v1.json")
    async with trio.open_nursery() as nursery:
        for path in FILES:
            nursery.start_soon(shown.digest, store.generation(f"m/v1/{path}"))
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        assert await shown.digest(store.generation("n/v1/config.json")) is not None
        assert trio.current_time() == began
    assert store.reads(f"m/{DIRECTORY}/v1.json") == [0]


async def test_a_manifest_that_cannot_be_read_is_logged(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    store.put(f"m/{DIRECTORY}/v1.json", b"{}")
    shown = versioned(store)
    assert await shown.digest(store.generation("m/v1/config.json")) is None
    assert "not a manifest, so the store's own digests count" in caplog.text
    caplog.clear()


async def test_a_failure_is_the_stores_own(store: MemoryStore) -> None:
    shown = versioned(store)
    store.fail(StoreUnavailableError("down"), times=100)
    for ask in (
        lambda: shown.list_page("m/"),
        lambda: probe(shown, "m/v1/"),
        lambda: shown.digest(store.generation("m/v1/config.json")),
    ):
        with pytest.raises(StoreUnavailableError, match="down"):
            await ask()


async def test_where_only_some_prefixes_may_be_listed_models_are_found(store: MemoryStore) -> None:
    store.fail(StoreAccessError("denied"), times=100, method="list_page", key=f"{DIRECTORY}/")
    assert (await probe(versioned(store), "plain/")).exists
