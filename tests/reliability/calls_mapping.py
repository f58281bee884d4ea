"""Mappings of files, and what can be done to them."""

import ctypes
import hashlib
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.reliability.calls import BIG, DIRECTORY, EMPTY, FILE, SIZES, Root, cases, outcome, outcomes
from tests.reliability.syscalls import checked, libc, map_file

PAGE = mmap.PAGESIZE
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
SHARED, PRIVATE, POPULATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_POPULATE
SHARED_VALIDATE, SYNC, LOCKED, NORESERVE, HUGE = 3, 0x80000, 0x2000, 0x4000, 0x40000
ADVICE = (0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 14, 15, 16, 18, 20, 21, 22, 23, 25, 99)
"""As in madvise(2): all that concern what is mapped, and 99, which is none."""
PAGES = -(-SIZES[FILE] // PAGE)


@contextmanager
def mapped(
    root: Root, protection: int = READ, flags: int = SHARED, name: str = FILE, pages: int = PAGES
) -> Iterator[int]:
    """The address of a mapping; ended with its process."""
    with root.opened(name) as descriptor:
        yield map_file(descriptor, pages * PAGE, protection, flags)


def seen(address: int, length: int = SIZES[FILE]) -> str:
    return hashlib.sha256(ctypes.string_at(address, length)).hexdigest()[:16]


def mapping(
    protection: int, flags: int, *, name: str = FILE, pages: int = PAGES, offset: int = 0
) -> Callable[[Root], object]:
    """Whether there can be such a mapping, and what is in it."""

    def tried(root: Root) -> object:
        with root.opened(name) as descriptor:
            address = map_file(descriptor, pages * PAGE, protection, flags, offset)
            return seen(address, min(pages * PAGE, PAGE)) if protection & READ else "mapped"

    return tried


def written(flags: int) -> Callable[[Root], object]:
    """A write to a mapping, and what the file has then."""

    def tried(root: Root) -> object:
        with mapped(root, READ | WRITE, flags) as address:
            ctypes.memset(address + 100, 65, 10)
            with root.opened() as descriptor:
                return ctypes.string_at(address + 98, 14)[2:12], hashlib.sha256(
                    os.pread(descriptor, 4096, 0)
                ).hexdigest()

    return tried


def touched(page: int, *, name: str = FILE, pages: int = PAGES + 2) -> Callable[[Root], object]:
    """A byte of a page that is not all in the file, or not at all."""

    def tried(root: Root) -> object:
        with mapped(root, name=name, pages=pages) as address:
            return ctypes.string_at(address + page * PAGE + PAGE - 1, 1)

    return tried


def advised(root: Root) -> object:
    """What each advice comes to, and that the content is the same after all."""
    with mapped(root, name=BIG, pages=64) as address:
        tried = outcomes(lambda one: checked(libc.madvise(address, 64 * PAGE, one)), ADVICE)
        return dict(zip(ADVICE, tried, strict=True)), seen(address, 64 * PAGE)


def resized(root: Root) -> object:
    with mapped(root, pages=2) as address:
        larger = checked(libc.mremap(address, 2 * PAGE, PAGES * PAGE, 1))
        smaller = checked(libc.mremap(larger, PAGES * PAGE, PAGE, 0))
        again = outcome(lambda: checked(libc.mremap(smaller, 0, PAGE, 1)) != 0)
        return seen(larger, PAGE), larger == smaller, again


def resident(root: Root) -> object:
    """Whether pages that have been read are told to be in memory."""
    with mapped(root) as address:
        content = seen(address)
        told = ctypes.create_string_buffer(PAGES)
        checked(libc.mincore(address, PAGES * PAGE, ctypes.addressof(told)))
        return content, [byte & 1 for byte in told.raw]


def inherited(root: Root) -> object:
    """What a child sees of mappings of its parent's, one of which that has written to."""
    with mapped(root) as shared, mapped(root, READ | WRITE, PRIVATE) as private:
        ctypes.memset(private, 66, 5)
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            ctypes.memset(private, 67, 2)
            os.write(sender, seen(shared).encode() + ctypes.string_at(private, 5))
            os._exit(0)
        os.waitpid(child, 0)
        return os.read(receiver, 100), ctypes.string_at(private, 5), seen(shared)


def faulting(root: Root) -> object:
    """The kernel's own accesses to what is not in the file."""
    receiver, sender = os.pipe()
    with mapped(root, pages=PAGES + 2) as address:
        place = ctypes.c_void_p(address + (PAGES + 1) * PAGE)
        del receiver
        return outcome(lambda: checked(libc.write(sender, place, 10)))


def protected(protection: int, flags: int) -> Callable[[Root], object]:
    """A change of the protection of a mapping for reading."""

    def tried(root: Root) -> object:
        with mapped(root, READ, flags) as address:
            return checked(libc.mprotect(address, PAGE, protection))

    return tried


def kept(root: Root) -> object:
    """A mapping whose file has been closed."""
    with mapped(root) as address:
        pass
    lines = [line for line in Path("/proc/self/maps").read_text().split("\n") if line.endswith(root / FILE)]
    return seen(address), len(lines)


cases(
    "map",
    shared=mapping(READ, SHARED),
    private=mapping(READ, PRIVATE),
    to_write_shared=mapping(READ | WRITE, SHARED),
    to_write_privately=mapping(READ | WRITE, PRIVATE),
    to_execute=mapping(READ | EXEC, PRIVATE),
    for_nothing=mapping(0, SHARED),
    neither_shared_nor_private=mapping(READ, 0),
    populated=mapping(READ, SHARED | POPULATE),
    populated_big=mapping(READ, SHARED | POPULATE, name=BIG, pages=768),
    locked=mapping(READ, SHARED | LOCKED),
    without_reserve=mapping(READ | WRITE, PRIVATE | NORESERVE),
    validated=mapping(READ, SHARED_VALIDATE),
    synchronously=mapping(READ, SHARED_VALIDATE | SYNC),
    unknown_flag=mapping(READ, SHARED_VALIDATE | 1 << 27),
    huge=mapping(READ, SHARED | HUGE),
    empty=mapping(0, SHARED, name=EMPTY, pages=1),
    directory=mapping(READ, SHARED, name=DIRECTORY, pages=1),
    nothing=mapping(READ, SHARED, pages=0),
    at_an_odd_place=mapping(READ, SHARED, pages=1, offset=100),
    from_the_second_page=mapping(READ, SHARED, pages=1, offset=PAGE),
    beyond_the_end=mapping(0, SHARED, pages=1, offset=1 << 30),
    by_name_only=lambda root: map_file(os.open(root / FILE, os.O_PATH), PAGE, READ, SHARED),
    kept_when_closed=kept,
)
cases(
    "touch",
    the_last_page_behind_the_end=touched(PAGES - 1),
    behind_the_last_page=touched(PAGES),
    of_an_empty_file=touched(0, name=EMPTY, pages=1),
    write_privately=written(PRIVATE),
    write_what_may_be_read=lambda root: ctypes.memset(mapped(root).__enter__(), 1, 1),
    by_the_kernel=faulting,
)


def sync(root: Root, flags: int) -> int:
    with mapped(root) as address:
        return checked(libc.msync(address, PAGE, flags))


def parted(root: Root) -> object:
    with mapped(root) as address:
        checked(libc.munmap(address, PAGE))
        return seen(address + PAGE, PAGE)


def told(root: Root) -> object:
    """A program may handle the signal of a page that is not there, and go on."""
    signal.signal(signal.SIGBUS, lambda *_: os._exit(0))
    with mapped(root, pages=PAGES + 1) as address:
        return signal.getsignal(signal.SIGBUS) is not None, seen(address, 10)


cases(
    "mapping",
    advice=advised,
    resize=resized,
    resident=resident,
    fork=inherited,
    protect_to_write_shared=protected(READ | WRITE, SHARED),
    protect_to_write_privately=protected(READ | WRITE, PRIVATE),
    protect_to_execute=protected(READ | EXEC, SHARED),
    protect_from_all=protected(0, SHARED),
    sync=lambda root: outcomes(partial(sync, root), (0, 1, 2, 4, 5, 6, 99)),
    lock=lambda root: checked(libc.mlock(mapped(root).__enter__(), PAGES * PAGE)),
    unmap_a_part=parted,
    signal_is_told=told,
)
