"""Handles from one server to the next: none lost, none that the kernel has not got, none used twice."""

from collections.abc import Callable

from trimsfs.filesystem.handles import BACKING_SHIFT, Handles
from trimsfs.handover.ledger import Ledger
from trimsfs.namespace.inodes import InodeKind, Inodes
from trimsfs.namespace.listing import Listing


def handles(ledger: Ledger) -> tuple[Handles, Inodes]:
    return Handles(ledger), Inodes(ledger)


def test_a_handle_that_the_kernel_has_not_heard_of_is_gone_and_a_doubtful_one_is_told(
    ledger: Callable[[], Ledger],
) -> None:
    before, inodes = handles(ledger())
    inode = inodes.reference(InodeKind.DIRECTORY, "dir/")
    inodes.count_lookup(inode)
    made, offered, unknown, has = (before.add_directory(inode, Listing()) for _ in range(4))
    before.offered(offered, 77)
    before.offered(unknown, 0)
    before.offered(has, 78)
    before.delivered(has)

    after, inodes = handles(ledger())

    assert after.restore(inodes).keys() == {offered, unknown, has}
    assert made not in after.directories
    assert after._unconfirmed == {77: offered}
    assert [after.resent(request) for request in (0, 78, 77, 77)] == [None, None, offered, None]
    assert after.remove(offered) is None

    last, inodes = handles(ledger())
    assert last.restore(inodes).keys() == {unknown, has}
    assert last._unconfirmed == {}


def test_a_handle_is_certain_once_no_open_comes_again(ledger: Callable[[], Ledger]) -> None:
    before, inodes = handles(ledger())
    inode = inodes.reference(InodeKind.DIRECTORY, "dir/")
    inodes.count_lookup(inode)
    handle = before.add_directory(inode, Listing())
    before.offered(handle, 77)

    after, inodes = handles(ledger())
    after.restore(inodes)
    after.all_resent()
    assert after.resent(77) is None

    last, inodes = handles(ledger())
    assert last.restore(inodes).keys() == {handle}
    assert last._unconfirmed == {}


def test_a_handle_never_comes_twice(ledger: Callable[[], Ledger]) -> None:
    seen: set[int] = set()
    for _ in range(5):
        server, inodes = handles(ledger())
        inode = inodes.reference(InodeKind.DIRECTORY, "dir/")
        inodes.count_lookup(inode)
        for _ in range(50):
            handle = server.add_directory(inode, Listing())
            assert handle not in seen
            seen.add(handle)
            server.remove(handle)


def test_a_number_that_comes_again_is_not_that_of_an_open_file(ledger: Callable[[], Ledger]) -> None:
    server, inodes = handles(ledger())
    inode = inodes.reference(InodeKind.DIRECTORY, "dir/")
    inodes.count_lookup(inode)
    stays = server.add_directory(inode, Listing())
    server._next = server._reserved = 1 << BACKING_SHIFT
    again = [server.add_directory(inode, Listing()) for _ in range(3)]
    assert again == [number for number in range(1, 5) if number != stays]
