"""Inodes and their numbers."""

import pytest

from tests.support.stores import MemoryStore
from tests.unit.namespace.common import a_generation, namespace_of
from trimsfs.errors import (
    NoSuchEntryError,
)
from trimsfs.namespace.tree import ROOT_INODE, InodeKind

THINGS = (
    (InodeKind.DIRECTORY, "a/", None, ""),
    (InodeKind.OBJECT, "a/", a_generation("a/"), ""),
    (InodeKind.OBJECT, "a", a_generation("a"), ""),
    (InodeKind.OBJECT, "a", a_generation("a", '"y"'), ""),
    (InodeKind.CONTROL_DIRECTORY, "", None, ""),
    (InodeKind.CONTROL_DIRECTORY, "a/", None, ""),
    (InodeKind.CONTROL_DIRECTORY, "a", a_generation("a"), "subject"),
    (InodeKind.CONTROL_FILE, "a", a_generation("a"), "info"),
    (InodeKind.CONTROL_FILE, "a", a_generation("a"), "evict"),
    (InodeKind.OBJECT, "latin1-\udce9", a_generation("latin1-\udce9"), ""),
)


def test_inode_numbers_are_the_same_in_every_namespace() -> None:
    here, there = (namespace_of(MemoryStore(), ttl_s=ttl_s) for ttl_s in (1, 2))
    numbers = [here.reference(*thing).number for thing in THINGS]
    assert [there.reference(*thing).number for thing in reversed(THINGS)] == numbers[::-1]
    assert len(set(numbers)) == len(numbers)
    assert all(ROOT_INODE < number < 1 << 63 for number in numbers)


def test_one_thing_has_one_inode() -> None:
    namespace = namespace_of(MemoryStore())
    first, again = ([namespace.reference(*thing) for thing in THINGS] for _ in range(2))
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert namespace.statistics().inodes == len(first) + 1
    for inode in first:
        assert namespace.inode(inode.number) is inode


def test_root_is_always_there() -> None:
    namespace = namespace_of(MemoryStore())
    root = namespace.reference(InodeKind.DIRECTORY, "")
    assert root is namespace.inode(ROOT_INODE)
    namespace.forget(ROOT_INODE, 1000)
    namespace.discard(root)
    assert namespace.inode(ROOT_INODE) is root


def test_new_generation_has_a_new_number_and_the_old_one_keeps_its_own() -> None:
    namespace = namespace_of(MemoryStore())
    old = namespace.reference(InodeKind.OBJECT, "a", a_generation("a", '"1"'))
    new = namespace.reference(InodeKind.OBJECT, "a", a_generation("a", '"2"'))
    assert old.number != new.number
    assert namespace.inode(old.number).generation == a_generation("a", '"1"')
    assert namespace.inode(new.number).generation == a_generation("a", '"2"')


def test_inodes_whose_numbers_would_be_equal_get_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.namespace.tree._INODE_BITS", 7)
    namespace = namespace_of(MemoryStore())
    inodes = [namespace.reference(InodeKind.DIRECTORY, f"{number}/") for number in range(80)]
    assert len({inode.number for inode in inodes}) == 80
    assert [inode.path for inode in inodes] == [f"{number}/" for number in range(80)]
    assert ROOT_INODE not in {inode.number for inode in inodes}
    for number, inode in enumerate(inodes):
        assert namespace.reference(InodeKind.DIRECTORY, f"{number}/") is inode


def test_inode_is_dropped_when_the_kernel_has_forgotten_it_as_often_as_it_was_told() -> None:
    namespace = namespace_of(MemoryStore())
    inode = namespace.reference(InodeKind.DIRECTORY, "a/")
    inode.lookups += 3
    namespace.forget(inode.number, 1)
    namespace.discard(inode)
    assert namespace.inode(inode.number) is inode
    namespace.forget(inode.number, 2)
    with pytest.raises(NoSuchEntryError):
        namespace.inode(inode.number)
    assert namespace.statistics().inodes == 1
    namespace.forget(inode.number, 1)


def test_inode_that_was_not_told_is_discarded() -> None:
    namespace = namespace_of(MemoryStore())
    inode = namespace.reference(InodeKind.DIRECTORY, "a/")
    namespace.discard(inode)
    with pytest.raises(NoSuchEntryError):
        namespace.inode(inode.number)
