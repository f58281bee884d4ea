"""Symbolic links of the store are links in the mount: named, followed, moved and taken over."""

import os
from pathlib import Path

import pytest

from tests.support.served import served
from tests.support.stores import MemoryStore
from tests.unit.namespace.common import look, namespace_of
from trimsfs.errors import InvalidRequestError, NoSuchEntryError
from trimsfs.handover.ledger import Ledger
from trimsfs.namespace.inodes import InodeKind, Inodes
from trimsfs.namespace.listing import NonObject
from trimsfs.types import Symlink


def link(target: str, key: str = "model/prod") -> Symlink:
    return Symlink(key=key, target=target)


async def test_a_link_is_listed_and_found_beside_files_and_directories() -> None:
    store = MemoryStore({"model/v1/params": b"1", "model/readme": b"r"})
    prod = store.link("model/prod", "v1")
    namespace = namespace_of(store)
    assert dict(await namespace.entries("model/")) == {
        b"prod": prod,
        b"readme": store.generation("model/readme"),
        b"v1": NonObject.DIRECTORY,
    }
    assert await look(namespace, "model/prod") == prod


async def test_a_link_in_a_large_directory_is_found_without_listing_it(large_store: MemoryStore) -> None:
    prod = large_store.link("large/prod", "000001")
    namespace = namespace_of(large_store)
    assert await look(namespace, "large/000002") == large_store.generation("large/000002")
    listed = large_store.count("list_page", "large/")
    assert await look(namespace, "large/prod") == prod
    assert large_store.count("list_page", "large/") == listed


@pytest.mark.parametrize(
    "target", ["", "x" * 4096, "a\0b", "\ud800", "/etc/passwd", "../../etc/passwd", "v1/../../../etc/passwd"]
)
async def test_a_link_that_no_kernel_can_follow_or_that_leads_out_is_hidden(target: str) -> None:
    store = MemoryStore({"model/readme": b"r"})
    store.link("model/prod", target)
    namespace = namespace_of(store)
    assert list(await namespace.entries("model/")) == [b"readme"]
    assert namespace.statistics().hidden_keys == 1


def test_link_that_moved_is_another_inode_and_each_outlives_the_server() -> None:
    memory = os.memfd_create("ledger")
    inodes = Inodes(Ledger(os.dup(memory)))
    old, new = (inodes.reference(InodeKind.SYMLINK, "model/prod", target=target) for target in ("v1", "v2"))
    assert old.number != new.number
    assert inodes.reference(InodeKind.SYMLINK, "model/prod", target="v1") is old
    for inode in (old, new):
        inodes.count_lookup(inode)
    successor = Inodes(Ledger(memory))
    assert {number: successor[number].target for number in (old.number, new.number)} == {
        old.number: "v1",
        new.number: "v2",
    }


async def test_the_kernel_gets_a_link_with_its_target(tmp_path: Path) -> None:
    store = MemoryStore({"model/v1/params": b"1"})
    store.link("model/prod", "v1")
    async with served(store, tmp_path, chunk_size=1 << 16) as server:
        found = await server.find("model/prod")
        assert oct(found.mode) == "0o120777"
        assert found.size == len("v1")
        assert server.filesystem.names.target(found.inode.number) == b"v1"
        with pytest.raises(InvalidRequestError, match="not a symbolic link"):
            server.filesystem.names.target(await server.number("model/v1/params"))
        assert await server.listing("model") == ["prod", "v1"]


async def test_control_files_are_those_of_the_target(tmp_path: Path) -> None:
    store = MemoryStore({"model/v1/params": b"1"})
    store.link("model/prod", "v1")
    async with served(store, tmp_path, chunk_size=1 << 16) as server:
        with pytest.raises(NoSuchEntryError):
            await server.find("model/.trims/prod")


async def test_commands_reach_the_files_that_links_lead_to_once(tmp_path: Path) -> None:
    store = MemoryStore({"blobs/a": b"a" * 100, "blobs/b": b"b" * 100, "readme": b"r"})
    store.link("snapshots/x", "../blobs/a")
    store.link("snapshots/y", "../blobs/a")
    store.link("snapshots/outside", "../../blobs/b")
    store.link("snapshots/nowhere", "../blobs/c")
    async with served(store, tmp_path, chunk_size=1 << 16) as server:
        assert await server.outcome("warm-host", "snapshots") == ("done", None)
    assert sorted(store.reads_by_key()) == ["blobs/a"]


@pytest.mark.parametrize(
    ("key", "target", "path"),
    [
        ("model/prod", "v1", "model/v1"),
        ("a/b/c", "../../x/y", "x/y"),
        ("a/b", "./c//d/.", "a/c/d"),
        ("a/b", "c/../d", None),
        ("a/b", "", None),
        ("a", ".", None),
        ("a", "b/", "b"),
        ("a", "..", None),
        ("a/b", "..", None),
        ("a/b", "../../c", None),
        ("a/b", "/c", None),
    ],
)
def test_where_a_link_leads(key: str, target: str, path: str | None) -> None:
    assert link(target, key).leads_to == path
