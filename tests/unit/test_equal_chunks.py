"""What a host has of a model's other versions is not fetched again: `--share-chunks`."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.parts import flip_byte
from tests.support.served import Server, Serving, served
from tests.support.stores import MemoryStore
from tests.support.versions import in_memory, publish
from trimsfs.errors import StoreUnavailableError
from trimsfs.extras.versions.content import Bytes
from trimsfs.extras.versions.description import LEAST_BYTES, describe
from trimsfs.extras.versions.difference import Version, compare
from trimsfs.formats import fingerprints
from trimsfs.formats.version_records import Manifest, fingerprints_key, manifest_key
from trimsfs.stores.retrying import Retrying

CHUNK = 64 << 10
CHUNKS = LEAST_BYTES // CHUNK + 4
"""In a file that is large enough for a fingerprint."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("description", "difference"):
        monkeypatch.setattr(f"trimsfs.extras.versions.{module}.CHUNK_SIZE", CHUNK)


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    def serve(store: MemoryStore, **options: Any) -> Any:
        return served(store, tmp_path, chunk_size=CHUNK, **{"share_chunks": True} | options)

    return serve


def content(seed: str, size: int = CHUNKS * CHUNK + 7) -> bytes:
    return random.Random(seed).randbytes(size)


def changed(data: bytes, *chunks: int) -> bytes:
    """The same, but for one byte in each of these chunks."""
    new = bytearray(data)
    for chunk in chunks:
        new[chunk * CHUNK + 5] ^= 1
    return bytes(new)


class ToRead(Bytes):
    """Content of which the digest is not known before it is read, as of a file."""

    async def sha256(self) -> None:  # type: ignore[override]
        return None


async def push(store: MemoryStore, name: str, version: str, files: Mapping[str, bytes], *, known: bool = False) -> None:
    """Publish a version as `trimsfs push` does or, with digests *known* before, as an import that was interrupted."""
    kind = Bytes if known else ToRead
    described = await describe({path: kind(data) for path, data in files.items()})
    prints = {path: file.fingerprint for path, file in described.items() if file.fingerprint is not None}
    put = in_memory(store)
    put(fingerprints_key(name, version), fingerprints.encode(version, prints))
    publish(put, name, version, files)


def newest(store: MemoryStore, key: str) -> bytes:
    return store.contents[key, store.generation(key).etag]


def missing(store: MemoryStore, first: str, second: str, name: str = "m") -> int:
    """The bytes that `trimsfs diff` says are fetched for the second version."""

    def version(which: str) -> Version:
        manifest = Manifest.parse(newest(store, manifest_key(name, which)))
        prints = fingerprints.parse(newest(store, fingerprints_key(name, which)))
        return Version(files=manifest.files, fingerprints=prints)

    return compare(version(first), version(second)).missing_bytes


async def published(*versions: Mapping[str, bytes]) -> MemoryStore:
    """A store with versions of a model ``m``: ``v1`` and so on."""
    store = MemoryStore()
    for number, files in enumerate(versions, 1):
        await push(store, "m", f"v{number}", files)
    return store


def fetched(store: MemoryStore, prefix: str) -> int:
    """The bytes that the store was asked for of files below a prefix."""
    return sum(each.length for each in store.requests if each.method == "read" and each.key.startswith(prefix))


async def load(server: Server, directory: str, files: Mapping[str, bytes]) -> None:
    """Load a model, and wait until it is on the disk and compared."""
    for path, data in files.items():
        assert await server.content(f"{directory}/{path}") == data, path
    for path in files:
        for _ in range(1000):
            if (await server.info(f"{directory}/{path}"))["verified"]:
                break
            await trio.sleep(0.005)
        else:
            raise AssertionError(f"{path} was not compared")


BASE = {"config.json": b"{}", "a.bin": content("a"), "b.bin": content("b"), "tokenizer.bin": content("c", 3000)}
TUNED = {
    "config.json": b"[]",
    "a.bin": changed(BASE["a.bin"], 2, 5, 6),
    "moved.bin": BASE["b.bin"],
    "tokenizer.bin": BASE["tokenizer.bin"],
    "shifted.bin": content("new", 2 * CHUNK) + BASE["b.bin"],
}


async def test_the_store_sends_of_a_version_what_diff_says(serving: Serving) -> None:
    store = await published(BASE, TUNED)
    expected = missing(store, "v1", "v2")
    assert expected == len(b"[]") + 3 * CHUNK + 2 * CHUNK
    async with serving(store) as server:
        await load(server, "m/v1", BASE)
        before = server.components.fetcher.statistics()
        assert (fetched(store, "m/v1/"), before.copied_bytes) == (sum(map(len, BASE.values())), 0)
        await load(server, "m/v2", TUNED)
        after = server.components.fetcher.statistics()
        fetcher: Any = server.components.fetcher
        assert not fetcher._equal._known, "what is known of files that are whole is forgotten"
    assert fetched(store, "m/v2/") == expected == after.fetched_bytes - before.fetched_bytes
    assert after.copied_bytes == sum(map(len, TUNED.values())) - expected


async def test_without_the_option_each_version_is_fetched_whole(serving: Serving) -> None:
    store = await published(BASE, TUNED)
    async with serving(store, share_chunks=False) as server:
        await load(server, "m/v1", BASE)
        await load(server, "m/v2", TUNED)
    assert fetched(store, "m/v2/") == sum(map(len, TUNED.values()))
    assert store.count("stat", fingerprints_key("m", "v2")) == 0


async def test_files_of_which_only_the_whole_digest_is_known_are_copied_whole(serving: Serving) -> None:
    store = MemoryStore()
    tuned = {**BASE, "a.bin": TUNED["a.bin"]}
    for version, files in (("v1", BASE), ("v2", tuned)):
        await push(store, "m", version, files, known=True)
    assert missing(store, "v1", "v2") == len(tuned["a.bin"])
    async with serving(store) as server:
        await load(server, "m/v1", BASE)
        await load(server, "m/v2", tuned)
    assert fetched(store, "m/v2/") == len(tuned["a.bin"])


@pytest.mark.parametrize(
    ("harm", "missing_bytes"),
    [
        pytest.param(lambda path: flip_byte(path, 3 * CHUNK + 100), CHUNK, id="wrong"),
        pytest.param(Path.unlink, len(BASE["a.bin"]), id="evicted meanwhile"),
    ],
)
async def test_chunks_that_are_wrong_on_the_disk_come_from_the_store(
    serving: Serving, harm: Callable[[Path], object], missing_bytes: int
) -> None:
    store = await published(BASE, BASE)
    async with serving(store) as server:
        await load(server, "m/v1", BASE)
        token = store.generation("m/v1/a.bin").token(store.identity)
        harm(server.disk.files.path(token))
        await load(server, "m/v2", BASE)
    assert fetched(store, "m/v2/") == missing_bytes


async def test_a_version_that_tells_wrong_chunks_is_found_out_by_its_manifest(serving: Serving) -> None:
    store = await published(BASE, {"a.bin": TUNED["a.bin"]})
    lie = newest(store, fingerprints_key("m", "v1"))
    store.put(fingerprints_key("m", "v2"), lie)
    async with serving(store, digests="wait") as server:
        await load(server, "m/v1", BASE)
        await load(server, "m/v2", {"a.bin": TUNED["a.bin"]})
        assert server.components.integrity.statistics().differing > 0


async def test_what_other_models_have_is_not_used(serving: Serving) -> None:
    """Else a reader of one model could tell by the time of a load, or by its own digests, what others have here."""
    store = MemoryStore()
    await push(store, "m", "v1", BASE)
    await push(store, "other", "v1", BASE)
    async with serving(store) as server:
        await load(server, "m/v1", BASE)
        await load(server, "other/v1", BASE)
        assert server.components.fetcher.statistics().copied_bytes == 0
    assert fetched(store, "other/v1/") == sum(map(len, BASE.values()))


async def test_versions_are_found_in_one_of_several_stores(serving: Serving) -> None:
    store, beside = MemoryStore(), MemoryStore(identity="memory://beside")
    for each in (store, beside):
        await push(each, "m", "v1", BASE)
        await push(each, "m", "v2", BASE)
    async with serving(store, beside={"deep/beside": beside}) as server:
        await load(server, "main/m/v1", BASE)
        await load(server, "deep/beside/m/v2", BASE)
        await load(server, "main/m/v2", BASE)
    assert fetched(beside, "m/v2/") == sum(map(len, BASE.values()))
    assert fetched(store, "m/v2/") == 0


@pytest.mark.parametrize("failing", ["stat", "read"])
async def test_a_load_goes_on_without_the_fingerprints(serving: Serving, failing: str) -> None:
    store = await published(BASE, TUNED)
    store.put(fingerprints_key("m", "v2"), b"no JSON") if failing == "read" else store.delete(
        fingerprints_key("m", "v2")
    )
    async with serving(store) as server:
        await load(server, "m/v1", BASE)
        await load(server, "m/v2", TUNED)
    assert fetched(store, "m/v2/") < sum(map(len, TUNED.values())), "whole files are known by the manifest"


async def test_a_version_published_anew_has_chunks_of_its_own(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.stores.layouts.version_manifests.RECHECK_S", 0)
    store = await published(BASE, {"a.bin": content("old")})
    async with serving(store, metadata_ttl=0.0) as server:
        await load(server, "m/v1", BASE)
        await load(server, "m/v2", {"a.bin": content("old")})
        await push(store, "m", "v2", {"a.bin": TUNED["a.bin"]})
        store.requests.clear()
        await load(server, "m/v2", {"a.bin": TUNED["a.bin"]})
        assert server.components.integrity.statistics().differing == 0
    assert fetched(store, "m/v2/") == 3 * CHUNK


async def test_while_the_store_is_away_no_read_waits_for_it_to_tell_of_chunks(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await published(BASE, TUNED)
    async with serving(store) as server:
        await load(server, "m/v1", BASE)
        monkeypatch.setattr(Retrying, "problem", lambda *_: "away")
        with pytest.raises(StoreUnavailableError, match="away"):
            await server.content("m/v2/a.bin")
        monkeypatch.undo()
    assert store.count("stat", fingerprints_key("m", "v2")) == 0
