"""A directory store over a cache that huggingface_hub has made: links from snapshots to blobs."""

import os
from pathlib import Path

import pytest

from tests.contract.backends import read
from tests.support.hf_cache import REPOSITORY, commit_of, download
from trimsfs.errors import ConfigurationError
from trimsfs.options import MountOptions
from trimsfs.stores.base import Store
from trimsfs.stores.open import open_store

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(100_000), "onnx/model.onnx": b"onnx" * 999}
NEWER = {**FILES, "config.json": b'{"newer": true}'}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two revisions of a repository."""
    directory = tmp_path_factory.mktemp("hf") / "hub"
    for files in (FILES, NEWER):
        made = download(directory, files)
        assert (made / "config.json").is_symlink()
    return directory


def opened(directory: Path) -> Store:
    return open_store(MountOptions(store=str(directory)), max_requests=4)


@pytest.mark.parametrize("above", [True, False], ids=["the cache", "one repository"])
async def test_snapshots_of_a_hugging_face_cache_are_read_and_blobs_have_one_content(cache: Path, above: bool) -> None:
    store = opened(cache if above else cache / REPOSITORY)
    prefix = f"{REPOSITORY}/" if above else ""
    contents = set()
    for files in (FILES, NEWER):
        snapshot = f"{prefix}snapshots/{commit_of(files)}/"
        page = await store.list_page(snapshot)
        assert {each.key: each.size for each in page.objects} == {
            f"{snapshot}{name}": len(body) for name, body in files.items() if "/" not in name
        }
        assert page.prefixes == (f"{snapshot}onnx/",)
        for name, body in files.items():
            found = await store.stat(f"{snapshot}{name}")
            assert await read(store, found) == body
            contents.add(found.token(store.identity))
    blobs = (await store.list_page(f"{prefix}blobs/")).objects
    assert contents == {blob.token(store.identity) for blob in blobs}
    assert len(contents) == 4
    main = await store.stat(f"{prefix}refs/main")
    assert await read(store, main) == commit_of(NEWER).encode()
    await store.aclose()


def test_a_snapshot_as_the_store_is_refused_with_the_directory_to_mount(cache: Path) -> None:
    """All its files are links that lead out of it: the mount would be empty."""
    with pytest.raises(
        ConfigurationError, match=rf"its links lead out of it, to .*/blobs/: mount {cache}/{REPOSITORY}\Z"
    ):
        opened(cache / REPOSITORY / "snapshots" / commit_of(FILES))


def test_a_directory_that_is_named_as_in_a_cache_may_be_a_store(tmp_path: Path) -> None:
    for name in ("blobs", "snapshots/v1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "snapshots/v1/model").write_bytes(b"x")
    (tmp_path / "snapshots/v1/link").symlink_to("model")
    opened(tmp_path / "snapshots/v1")
