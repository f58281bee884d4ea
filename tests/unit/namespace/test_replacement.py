"""An object that was replaced: nothing counts any more that was known of its siblings, here and in the kernel."""

import pytest
import trio
from trio.testing import MockClock

from tests.support.stores import MemoryStore, as_store
from tests.unit.namespace.common import TTL_S, look
from trimsfs.namespace.inodes import InodeKind
from trimsfs.namespace.tree import Namespace
from trimsfs.types import Generation

NAMES = ("model/1", "model/2", "other")


class Kernel:
    """A namespace of three objects that the kernel has looked up, and what it was told since."""

    def __init__(self, store: MemoryStore, ttl_s: float) -> None:
        self.invalidated: list[tuple[int, bytes]] = []
        self.replaced: list[str] = []
        self.namespace = Namespace(
            as_store(store),
            ttl_s=ttl_s,
            invalidate=lambda *name: self.invalidated.append(name),
            replaced=self.replaced.append,
        )

    async def look(self) -> None:
        """Look the objects up, which the kernel then knows."""
        for name in NAMES:
            entry = await look(self.namespace, name)
            assert isinstance(entry, Generation)
            inodes = self.namespace.inodes
            inodes.count_lookup(inodes.reference(InodeKind.OBJECT, name, entry))

    def told(self) -> set[bytes]:
        """The names of ``model`` that the kernel is to look up anew."""
        number = self.namespace.inodes.reference(InodeKind.DIRECTORY, "model/").number
        assert {directory for directory, _ in self.invalidated} <= {number}
        return {name for _, name in self.invalidated}


def fill(store: MemoryStore, content: bytes) -> None:
    for name in NAMES:
        store.put(name, content)


async def test_a_content_that_is_gone_has_its_directory_looked_up_anew(store: MemoryStore) -> None:
    fill(store, b"old")
    kernel = Kernel(store, TTL_S)
    await kernel.look()
    old = await look(kernel.namespace, "model/1")
    assert isinstance(old, Generation)
    fill(store, b"new")
    assert not kernel.namespace.is_replaced(old)

    kernel.namespace.replaced(old)

    assert kernel.told() == {b"1", b"2"}
    assert kernel.replaced == ["model/"]
    found = await look(kernel.namespace, "model/2")
    assert isinstance(found, Generation)
    assert found.etag != old.etag
    assert kernel.namespace.is_replaced(old)
    kernel.invalidated.clear()
    kernel.namespace.replaced(old)  # by another who has it open
    assert not kernel.invalidated


async def test_a_listing_with_another_content_tells_of_it(store: MemoryStore, autojump_clock: MockClock) -> None:
    fill(store, b"old")
    kernel = Kernel(store, TTL_S)
    await kernel.look()
    await trio.sleep(TTL_S + 1)
    store.put("model/3", b"added")
    await kernel.look()
    assert kernel.replaced == []
    store.put("model/2", b"new")
    await trio.sleep(TTL_S + 1)
    await look(kernel.namespace, "model/1")
    assert kernel.told() == {b"1", b"2"}
    assert kernel.replaced == ["model/"]


@pytest.mark.parametrize("path", ["model/", ""])
async def test_what_a_refresh_finds_replaced_is_told_of(
    store: MemoryStore, autojump_clock: MockClock, path: str
) -> None:
    fill(store, b"old")
    kernel = Kernel(store, TTL_S)
    await kernel.look()
    await trio.sleep(1)
    fill(store, b"new")
    kernel.namespace.expire(path)
    await trio.sleep(1)
    await kernel.look()
    assert kernel.replaced.count("model/") == 1
    assert kernel.replaced.count("") == (path == "")


@pytest.mark.parametrize("asked_before", [True, False])
async def test_an_answer_for_one_name_counts_for_its_siblings(
    store: MemoryStore, autojump_clock: MockClock, asked_before: bool
) -> None:
    fill(store, b"old")
    kernel = Kernel(store, TTL_S)
    await kernel.look()
    old = await look(kernel.namespace, "model/1")
    if asked_before:
        kernel.namespace.mark_outdated("model/2")
        await trio.sleep(0.1)
        await look(kernel.namespace, "model/2")
    fill(store, b"new")
    kernel.namespace.mark_outdated("model/1")
    await trio.sleep(0.1)
    new = await look(kernel.namespace, "model/1")
    assert new != old
    assert kernel.told() == {b"1", b"2"}
    sibling = await look(kernel.namespace, "model/2")
    assert isinstance(sibling, Generation)
    assert isinstance(new, Generation)
    assert sibling.etag == new.etag
