"""What only a directory as a store has: links, special files, files written in place, errors of a disk."""

import errno
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.contract.backends import read
from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreStalledError,
    TransientStoreError,
)
from trimsfs.stores import local_directory, stall_guard
from trimsfs.stores.local_directory import MOST_NAMES, DirectoryStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The store's directory; beside it is a file that is not in the store."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
async def store(root: Path) -> AsyncIterator[DirectoryStore]:
    store = DirectoryStore(root)
    yield store
    await store.aclose()


async def shown(store: DirectoryStore, prefix: str = "") -> list[str]:
    page = await store.list_page(prefix)
    return sorted([*(generation.key for generation in page.objects), *page.prefixes])


async def test_links_that_stay_inside_are_followed(root: Path, store: DirectoryStore) -> None:
    (root / "v2").mkdir()
    (root / "v2/params").write_bytes(b"weights")
    (root / "latest").symlink_to("v2")
    (root / "model").symlink_to(root / "latest/params")

    assert await shown(store) == ["latest/", "model", "v2/"]
    assert await shown(store, "latest/") == ["latest/params"]
    for key in ("model", "latest/params"):
        assert await read(store, await store.stat(key)) == b"weights"


async def test_link_that_now_leads_to_another_file_is_another_generation(root: Path, store: DirectoryStore) -> None:
    """What has the old one open reads on in the file that the link has led to."""
    (root / "v1").write_bytes(b"old bytes")
    (root / "v2").write_bytes(b"new bytes")
    (root / "latest").symlink_to("v1")
    old = await store.stat("latest")
    (root / "new").symlink_to("v2")
    (root / "new").replace(root / "latest")

    assert (await store.stat("latest")).etag != old.etag
    assert await read(store, await store.stat("latest")) == b"new bytes"
    assert await read(store, old) == b"old bytes"
    (root / "v1").write_bytes(b"other bytes")
    with pytest.raises(ObjectChangedError):
        await read(store, old)


async def test_all_links_to_a_file_have_its_content(root: Path, store: DirectoryStore) -> None:
    """By whatever way they are found, and as long as it stays."""
    (root / "blobs").mkdir()
    (root / "blobs/aaaa").write_bytes(b"weights")
    for revision in ("r1", "r2"):
        (root / "snapshots" / revision).mkdir(parents=True)
        (root / "snapshots" / revision / "model").symlink_to("../../blobs/aaaa")
    (root / "main").symlink_to("snapshots/r1")
    (root / "absolute").symlink_to(root / "blobs")
    keys = ["blobs/aaaa", "snapshots/r1/model", "snapshots/r2/model", "main/model", "absolute/aaaa"]

    found = [await store.stat(key) for key in keys]

    listed = [await store.list_page(key.rpartition("/")[0] + "/") for key in keys]
    assert [page.objects for page in listed] == [(generation,) for generation in found]
    assert [generation.key for generation in found] == keys
    assert len({generation.token(store.identity) for generation in found}) == 1
    apart = DirectoryStore(root, share_links=False)
    assert len({(await apart.stat(key)).token(store.identity) for key in keys}) == len(keys)
    await apart.aclose()
    (root / "snapshots/r2/model").unlink()
    assert await read(store, found[2]) == b"weights"


@pytest.mark.parametrize(
    "target", ["../outside/secret", "../outside", "nowhere", "link", "link/below", "/etc/passwd", "..", "."]
)
async def test_links_that_lead_out_nowhere_or_round_do_not_exist(
    root: Path, store: DirectoryStore, target: str
) -> None:
    (root / "model").write_bytes(b"weights")
    (root / "link").symlink_to(target)

    assert await shown(store) == ["model"]
    for key in ("link", "link/secret"):
        with pytest.raises(ObjectNotFoundError):
            await store.stat(key)
    if target != ".":
        assert await shown(store, "link/") == []


@pytest.mark.parametrize("key", ["../outside/secret", "/etc/passwd", "a/../../outside/secret"])
async def test_no_key_leads_out(root: Path, store: DirectoryStore, key: str) -> None:
    (root / "a").mkdir()
    with pytest.raises(ObjectNotFoundError):
        await store.stat(key)
    assert await shown(store, key.rpartition("/")[0] + "/") == []


async def test_special_files_do_not_exist(root: Path, store: DirectoryStore) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    (root / "model").write_bytes(b"weights")

    assert await shown(store) == ["model"]
    for key in ("fifo", "socket"):
        with pytest.raises(ObjectNotFoundError):
            await store.stat(key)


async def test_fifo_in_place_of_a_file_gives_no_bytes_and_does_not_block(root: Path, store: DirectoryStore) -> None:
    (root / "model").write_bytes(b"weights")
    old = await store.stat("model")
    (root / "model").unlink()
    os.mkfifo(root / "model")

    with trio.fail_after(5), pytest.raises((ObjectChangedError, ObjectNotFoundError)):
        await read(store, old)


@pytest.mark.parametrize("content", [b"short", b"and longer than before", b"new bytes"])
async def test_file_written_in_place_gives_no_bytes_for_the_old_generation(
    root: Path, store: DirectoryStore, content: bytes
) -> None:
    path = root / "model"
    path.write_bytes(b"old bytes")
    os.utime(path, ns=(0, 1_000_000_000))
    old = await store.stat("model")
    path.write_bytes(content)

    for length in (1, 9):
        with pytest.raises(ObjectChangedError):
            await read(store, old, 0, length)


async def test_directory_that_vanishes_is_not_taken_for_an_empty_one(root: Path, store: DirectoryStore) -> None:
    (root / "model").write_bytes(b"weights")
    assert await shown(store) == ["model"]
    os.rename(root, f"{root}-unmounted")

    with pytest.raises((BucketNotFoundError, TransientStoreError), match=str(root)):
        await store.list_page("")


async def test_a_file_as_the_store_is_told_with_the_directory_to_name(root: Path) -> None:
    (root / "w.npy").write_bytes(b"weights")
    for store, remedy in ((root / "w.npy", f": name the one that it lies in, {root}"), (root / "w.npy/x", "")):
        async with aclosing(DirectoryStore(store)) as opened:
            with pytest.raises(BucketNotFoundError, match=f"^store directory {store} is not a directory{remedy}$"):
                await opened.probe()


@pytest.mark.parametrize(("number", "expected"), [(errno.EACCES, StoreAccessError), (errno.EIO, TransientStoreError)])
async def test_errors_of_the_disk_are_told_in_one_line_with_the_path(
    root: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    path = root / "model"
    path.write_bytes(b"weights")
    generation = await store.stat("model")

    def fail(path: Any, *_arguments: Any, **_named: Any) -> Any:
        raise OSError(number, os.strerror(number), path)

    for name, call in (
        ("lseek", lambda: store.list_page("")),
        ("scandir", store.probe),
        ("open", lambda: store.stat("model")),
        ("open", lambda: read(store, generation)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"trimsfs.stores.local_directory.os.{name}", fail)
            with pytest.raises(expected, match=rf"\A{root}[^\n]*: {os.strerror(number)}(: [^\n]+)?\Z"):
                await call()


async def test_pages_are_read_one_after_the_other_whatever_comes_and_goes(
    root: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays is in one page, and no page takes the others to be read again."""
    for number in range(5000):
        (root / f"model-{number}").touch()
    read_bytes = 0
    getdents = local_directory._getdents64

    def counted(*arguments: Any) -> int:
        nonlocal read_bytes
        count: int = getdents(*arguments)
        read_bytes += count
        return count

    monkeypatch.setattr("trimsfs.stores.local_directory._getdents64", counted)
    await store.list_page("", limit=MOST_NAMES)
    once, read_bytes = read_bytes, 0
    token, found = None, list[str]()
    while token is not None or not found:
        page = await store.list_page("", token=token, limit=1000)
        found += [generation.key for generation in page.objects]
        token = page.next_token
        (root / found[-10]).unlink()
        (root / f"new-{len(found)}").touch()
    stayed = {f"model-{number}" for number in range(5000)} & set(os.listdir(root))
    assert stayed <= set(found)
    assert len(found) == len(set(found))
    assert read_bytes < 2 * once


async def test_a_file_system_that_hangs_is_a_store_that_stalls(
    root: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "model").write_bytes(b"weights")
    generation, answers = await store.stat("model"), threading.Event()
    open_file = os.open

    def hang(*arguments: Any, **named: Any) -> int:
        answers.wait(20)
        return open_file(*arguments, **named)

    monkeypatch.setattr(stall_guard, "STALL_S", 0.2)
    monkeypatch.setattr(local_directory, "STALL_S", 0.2)
    monkeypatch.setattr(local_directory, "SLOWEST_STAT_S", 0.0)
    monkeypatch.setattr(os, "open", hang)
    try:
        with trio.fail_after(10):
            for request in (store.list_page(""), store.read(generation, 0, 7, lambda _: None)):
                with pytest.raises(StoreStalledError, match=r"root: no answer in 0\.2 s"):
                    await request
    finally:
        answers.set()
    monkeypatch.setattr(os, "open", open_file)
    assert await read(store, generation) == b"weights"


async def test_a_file_system_may_be_slow(root: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(12 * local_directory.PIECE)
    (root / "model").write_bytes(content)
    generation, preadv = await store.stat("model"), os.preadv

    def slow(*arguments: Any) -> int:
        time.sleep(0.2)
        return preadv(*arguments)

    monkeypatch.setattr(stall_guard, "STALL_S", 2.0)
    monkeypatch.setattr(stall_guard, "_REPORT_INTERVAL_S", 0.0)
    monkeypatch.setattr(os, "preadv", slow)
    assert await read(store, generation) == content
