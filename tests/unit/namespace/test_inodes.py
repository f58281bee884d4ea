"""Inodes and their numbers, from one server to the next."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.namespace.common import a_generation
from trimsfs.errors import NoSuchEntryError
from trimsfs.handover.ledger import Ledger
from trimsfs.namespace.inodes import ROOT_INODE, InodeKind, Inodes
from trimsfs.types import Generation

GENERATION = Generation(key="dir/model", etag='"1"', size=5, modified_ns=7)
_ODD = Generation(key="odd", etag="", size=0, modified_ns=0, linked="\udcff")

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
    (InodeKind.OBJECT, "link", replace(a_generation("link"), linked="dir/a"), ""),
)


def test_inode_numbers_are_the_same_on_every_server() -> None:
    here, there = (Inodes(Ledger()) for _ in range(2))
    numbers = [here.reference(*thing).number for thing in THINGS]
    assert [there.reference(*thing).number for thing in reversed(THINGS)] == numbers[::-1]
    assert len(set(numbers)) == len(numbers)
    assert all(ROOT_INODE < number < 1 << 63 for number in numbers)


def test_one_thing_has_one_inode() -> None:
    inodes = Inodes(Ledger())
    first, again = ([inodes.reference(*thing) for thing in THINGS] for _ in range(2))
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert len(inodes) == len(first) + 1
    for inode in first:
        assert inodes[inode.number] is inode


def test_root_is_always_there() -> None:
    inodes = Inodes(Ledger())
    root = inodes.reference(InodeKind.DIRECTORY, "")
    assert root is inodes[ROOT_INODE]
    inodes.forget(ROOT_INODE, 1000)
    inodes.discard(root)
    assert inodes[ROOT_INODE] is root


def test_inodes_whose_numbers_would_be_equal_get_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimsfs.namespace.inodes._INODE_BITS", 7)
    inodes = Inodes(Ledger())
    made = [inodes.reference(InodeKind.DIRECTORY, f"{number}/") for number in range(80)]
    assert len({inode.number for inode in made}) == 80
    assert [inode.path for inode in made] == [f"{number}/" for number in range(80)]
    assert ROOT_INODE not in {inode.number for inode in made}
    for number, inode in enumerate(made):
        assert inodes.reference(InodeKind.DIRECTORY, f"{number}/") is inode


def test_inode_is_dropped_when_the_kernel_has_forgotten_it_as_often_as_it_was_told() -> None:
    inodes = Inodes(Ledger())
    inode = inodes.reference(InodeKind.DIRECTORY, "a/")
    inode.lookups += 3
    inodes.forget(inode.number, 1)
    inodes.discard(inode)
    assert inodes[inode.number] is inode
    inodes.forget(inode.number, 2)
    with pytest.raises(NoSuchEntryError):
        inodes[inode.number]
    assert len(inodes) == 1
    inodes.forget(inode.number, 1)


def test_inode_that_was_not_told_is_discarded() -> None:
    inodes = Inodes(Ledger())
    inode = inodes.reference(InodeKind.DIRECTORY, "a/")
    inodes.discard(inode)
    with pytest.raises(NoSuchEntryError):
        inodes[inode.number]


def test_inodes_are_what_they_were(ledger: Callable[[], Ledger]) -> None:
    before = Inodes(ledger())
    told = [
        before.reference(InodeKind.DIRECTORY, "dir/"),
        before.reference(InodeKind.OBJECT, "dir/model", GENERATION),
        before.reference(InodeKind.OBJECT, "dir/model", replace(GENERATION, etag='"other"')),
        before.reference(InodeKind.CONTROL_FILE, "dir/model", GENERATION, "info"),
        before.reference(InodeKind.OBJECT, "odd \udcff\n\0", _ODD),
    ]
    for times, inode in enumerate(told, 1):
        for _ in range(times):
            before.count_lookup(inode)
    before.forget(told[1].number, 2)
    before.forget(told[4].number, 4)

    after = Inodes(ledger())

    for inode in (told[0], told[2], told[3], told[4]):
        found = after[inode.number]
        assert (found.kind, found.path, found.generation, found.control, found.lookups) == (
            *(inode.kind, inode.path, inode.generation, inode.control),
            inode.lookups,
        )
    assert after.get(told[1].number) is None
    after.forget(told[2].number, 3)
    assert Inodes(ledger()).get(told[2].number) is None


def test_all_numbers_of_a_file_and_of_links_to_it_are_found() -> None:
    """Each has pages in the kernel's cache, which may be wrong when a blob turns out to be."""
    inodes = Inodes(Ledger())
    link, other = replace(GENERATION, key="link", linked=GENERATION.key), replace(GENERATION, key="other")
    told = [inodes.reference(InodeKind.OBJECT, each.key, each) for each in (GENERATION, link, other)]
    told.append(inodes.reference(InodeKind.CONTROL_FILE, link.key, link, "info"))
    for inode in told:
        inodes.count_lookup(inode)
    for each in (GENERATION, link):
        assert inodes.numbers(each) == [told[0].number, told[1].number]
    inodes.forget(told[0].number, 1)
    assert inodes.numbers(GENERATION) == [told[1].number]


def test_names_are_found_by_their_directory_and_not_among_all() -> None:
    inodes = Inodes(Ledger())
    told = [
        inodes.reference(InodeKind.DIRECTORY, "dir/"),
        inodes.reference(InodeKind.DIRECTORY, "dir/below/"),
        *(inodes.reference(InodeKind.OBJECT, key, a_generation(key)) for key in ("dir/a", "dir/below/b", "other")),
        inodes.reference(InodeKind.OBJECT, "dir/a", a_generation("dir/a", '"other"')),
        inodes.reference(InodeKind.CONTROL_FILE, "dir/a", a_generation("dir/a"), "info"),
    ]
    for inode in told:
        inodes.count_lookup(inode)
    inodes.reference(InodeKind.OBJECT, "dir/unknown", a_generation("dir/unknown"))
    directory, below = told[0].number, told[1].number

    assert sorted(inodes.known_names("dir/")) == [(directory, b"a"), (directory, b"below")]
    assert inodes.known_names("dir/", {InodeKind.OBJECT}) == [(directory, b"a")]
    assert sorted(inodes.known_names_below("dir/")) == sorted(
        [(1, b"dir"), (directory, b"a"), (directory, b"below"), (below, b"b")]
    )
    assert inodes.known_names_below("dir/a") == [(directory, b"a")]
    assert len(inodes.known_names_below("")) == 5
    for inode in told:
        inodes.forget(inode.number, 1)
    assert inodes.known_names_below("") == []


def test_the_names_of_a_directory_are_found_without_a_look_at_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    inodes = Inodes(Ledger())
    for number in range(1000):
        inodes.count_lookup(inodes.reference(InodeKind.OBJECT, f"{number % 100}/{number}", a_generation(f"{number}")))
    monkeypatch.setattr(Inodes, "__iter__", None)
    assert {name for _, name in inodes.known_names("7/")} == {b"%d" % number for number in range(7, 1000, 100)}
    assert len(inodes.numbers(a_generation("7/7", '"y"'))) == 0
