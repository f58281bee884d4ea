"""Calls that look: paths, flags, attributes, directories, reads, locks, events."""

import ctypes
import fcntl
import hashlib
import itertools
import os
import select
import socket
import stat
import struct
import tempfile
from collections.abc import Callable
from functools import partial

from tests.reliability.calls import BIG, DIRECTORY, EMPTY, FILE, MISSING, SIZES, Root, cases, outcome, outcomes
from tests.reliability.calls_changing import on_each
from tests.reliability.syscalls import AT_EMPTY_PATH, call, checked, getdents, libc, openat2, statx, syscall

PATHS = (
    *(FILE, DIRECTORY, MISSING, ".", "", "/", "./", "dir//file", "dir/./file", "dir/../dir/file", "../root/dir/file"),
    *("dir/file/", "dir/file/.", "dir/file/..", "dir/file/x", "dir/missing/..", "dir/", "dir/.", "dir/..", "Dir/file"),
    *("n" * 255, "n" * 256, "dir/" + "n" * 256, "/".join(["d" * 200] * 18), "x/" * 2100, "dir\\file", " dir", "dir "),
)
_GET_FLAGS, _FIEMAP, _BLOCK_SIZE, _TCGETS = 0x80086601, 0xC020660B, 0x2, 0x5401


def looked(root: Root, name: str) -> object:
    status = os.stat(root / name)
    size = status.st_size if stat.S_ISREG(status.st_mode) else None
    return stat.filemode(status.st_mode), size, status.st_uid, status.st_gid


def entered(root: Root) -> object:
    os.chdir(root / DIRECTORY)
    return os.getcwd() == root / DIRECTORY, os.stat("../dir/file").st_size, os.listdir("..") != []


cases(
    "path",
    stat=on_each(PATHS, looked),
    lstat=on_each(PATHS, lambda root, name: stat.filemode(os.lstat(root / name).st_mode)),
    open=on_each(PATHS, lambda root, name: os.close(os.open(root / name, os.O_RDONLY))),
    open_without_links=on_each(PATHS, lambda root, name: os.close(os.open(root / name, os.O_NOFOLLOW))),
    list=on_each(PATHS, lambda root, name: len(os.listdir(root / name)) > 2),
    chdir=on_each(PATHS, lambda root, name: call("chdir", os.fsencode(root / name))),
    readlink=on_each(PATHS, lambda root, name: os.readlink(root / name)),
    by_a_link=lambda root: outcomes(partial(looked, Root(root.scratch, "")), ("link", "loop")),
    link_with_a_slash=lambda root: looked(Root(root.scratch, ""), "link/"),
    too_many_links=lambda root: looked(Root(root.scratch, ""), "chain-50/file"),
    not_text=lambda root: os.stat(os.fsencode(root.path) + b"/\xff\xfe"),
    getcwd=entered,
)


def flagged(flags: int, name: str = FILE) -> Callable[[Root], object]:
    """What can be read of a file that is opened so, and what its flags are."""

    def tried(root: Root) -> object:
        with root.opened(name, flags) as descriptor:
            room = ctypes.create_string_buffer(2 * 4096)
            place = (ctypes.addressof(room) + 4095) // 4096 * 4096
            read = outcome(lambda: checked(libc.pread(descriptor, ctypes.c_void_p(place), 4096, 0)))
            return read, oct(fcntl.fcntl(descriptor, fcntl.F_GETFL))

    return tried


def resolved(flags: int, path: str) -> Callable[[Root], object]:
    """Opening a path below the root that may be resolved in some ways only."""

    def tried(root: Root) -> object:
        directory = os.open(root.path, os.O_PATH)
        return os.fstat(openat2(directory, path, os.O_RDONLY, flags)).st_size

    return tried


def direct_reads(root: Root) -> list[str]:
    """Reads past the page cache of odd sizes, from odd places, to odd addresses."""
    room = ctypes.create_string_buffer(3 * 4096)
    place = (ctypes.addressof(room) + 4095) // 4096 * 4096
    with root.opened(BIG, os.O_DIRECT) as descriptor:

        def read(where: tuple[int, int]) -> int:
            return checked(libc.pread(descriptor, ctypes.c_void_p(place), where[1], ctypes.c_long(where[0])))

        return outcomes(read, [(0, 4096), (4096, 8192), (SIZES[BIG] // 4096 * 4096, 4096), (1 << 30, 4096)])


def reopened(root: Root) -> object:
    with root.opened(FILE, os.O_PATH) as named:
        status = os.fstat(named)
        again = os.open(f"/proc/self/fd/{named}", os.O_RDONLY)
        return os.fstat(again).st_ino == status.st_ino, len(os.read(again, 100)), outcome(lambda: os.read(named, 1))


def changed_flags(root: Root) -> list[str]:
    with root.opened() as descriptor:
        flags = (os.O_NONBLOCK, os.O_APPEND, os.O_NOATIME, os.O_DIRECT, os.O_RDWR)
        tried = outcomes(partial(fcntl.fcntl, descriptor, fcntl.F_SETFL), flags)
        return [*tried, oct(fcntl.fcntl(descriptor, fcntl.F_GETFL))]


cases(
    "flags",
    **{
        name: flagged(getattr(os, f"O_{name.upper()}"))
        for name in (
            "rdonly",
            "direct",
            "path",
            "nonblock",
            "nofollow",
            "sync",
            "dsync",
            "noatime",
            "async",
            "directory",
        )
    },
    large=flagged(0o100000),
    directory_of_a_directory=flagged(os.O_DIRECTORY, DIRECTORY),
    path_of_a_directory=flagged(os.O_PATH, DIRECTORY),
    unknown=flagged(1 << 30),
    direct_at_odd_places=direct_reads,
    again_by_proc=reopened,
    beneath=resolved(0x08, FILE),
    beneath_and_out=resolved(0x08, "../root/dir/file"),
    in_root=resolved(0x10, "/dir/file"),
    in_root_and_out=resolved(0x10, "../../dir/file"),
    without_links=resolved(0x04, FILE),
    on_this_mount=resolved(0x01, FILE),
    unknown_resolution=resolved(1 << 20, FILE),
    change_of_flags=changed_flags,
)


cases(
    "attributes",
    times=on_each((FILE, BIG, EMPTY), lambda root, name: os.stat(root / name).st_mtime_ns),
    of_a_descriptor=on_each(
        (FILE, DIRECTORY), lambda root, name: os.path.samestat(os.stat(root / name), os.fstat(os.open(root / name, 0)))
    ),
    links_of_a_file=lambda root: os.stat(root / FILE).st_nlink,
    links_of_a_directory=lambda root: os.stat(root / DIRECTORY).st_nlink,
    size_of_a_directory=lambda root: os.stat(root / DIRECTORY).st_size,
    blocks=on_each((FILE, BIG, EMPTY, "sparse"), lambda root, name: -(-os.stat(root / name).st_blocks // 8)),
    statx=on_each((FILE, DIRECTORY), lambda root, name: statx(root / name)[1:]),
    statx_birth=lambda root: bool(statx(root / FILE)[0] & 0x800),
    statx_fresh=lambda root: statx(root / FILE, 0x2000)[2],
    statx_known=lambda root: statx(root / FILE, 0x4000)[2],
    statx_unknown=lambda root: statx(root / FILE, 1 << 30),
    statx_odd=lambda root: statx(root / FILE, 0x6000),
    file_system=lambda root: (os.statvfs(root / FILE).f_namemax, oct(os.statvfs(root / FILE).f_flag)),
    missing=lambda root: os.getxattr(root / FILE, "user.missing"),
    of_trusted=lambda root: os.getxattr(root / FILE, "trusted.missing"),
    of_security=lambda root: os.getxattr(root / FILE, "security.capability"),
    of_acl=lambda root: os.getxattr(root / FILE, "system.posix_acl_access"),
    of_nothing=lambda root: os.getxattr(root / FILE, "nothing"),
    names=lambda root: os.listxattr(root / FILE),
    names_of_a_directory=lambda root: os.listxattr(root / DIRECTORY),
)

_opendir, _readdir, _telldir, _seekdir = libc.opendir, libc.readdir, libc.telldir, libc.seekdir
_opendir.restype = _readdir.restype = ctypes.c_void_p
_telldir.restype = ctypes.c_long
_telldir.argtypes = _readdir.argtypes = libc.closedir.argtypes = libc.rewinddir.argtypes = [ctypes.c_void_p]
_seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


def entries(stream: int) -> list[bytes]:
    """The names that are left of a directory."""
    names = []
    while entry := _readdir(stream):
        names.append(ctypes.string_at(entry + 19))
    return names


def sought(root: Root) -> object:
    """From each position on, what was read after it."""
    stream = _opendir(os.fsencode(root / "many"))
    positions, names = [_telldir(stream)], []
    while entry := _readdir(stream):
        names.append(ctypes.string_at(entry + 19))
        positions.append(_telldir(stream))
    same = 0
    for index in range(0, len(names) + 1, 37):
        _seekdir(stream, positions[index])
        same += entries(stream) == names[index:]
    libc.rewinddir(stream)
    return len(names), same, entries(stream) == names, len(set(positions)) == len(positions)


def in_small_pieces(root: Root) -> object:
    with root.opened("many") as descriptor:
        pieces = 0
        while getdents(descriptor, 64):
            pieces += 1
        return pieces > 20, getdents(descriptor, 4096)


cases(
    "directory",
    names=on_each((".", DIRECTORY, "many", "empty-dir"), lambda root, name: sorted(os.listdir(root / name))),
    kinds=lambda root: sorted(
        (one.name, one.is_dir(), one.is_file(), one.is_symlink()) for one in os.scandir(root.path)
    ),
    dots=lambda root: sorted(entries(_opendir(os.fsencode(root / "empty-dir")))),
    positions=sought,
    small_pieces=in_small_pieces,
    piece_too_small=lambda root: getdents(os.open(root / "many", os.O_RDONLY), 10),
    of_a_file=lambda root: getdents(os.open(root / FILE, os.O_RDONLY), 4096),
    read=lambda root: os.read(os.open(root / DIRECTORY, os.O_RDONLY), 10),
    read_at=lambda root: os.pread(os.open(root / DIRECTORY, os.O_RDONLY), 10, 0),
    seek_to_the_start=lambda root: os.lseek(os.open(root / "many", os.O_RDONLY), 0, os.SEEK_SET),
    seek_below=lambda root: os.lseek(os.open(root / "many", os.O_RDONLY), -1, os.SEEK_SET),
    relative=lambda root: os.stat("file", dir_fd=os.open(root / DIRECTORY, os.O_RDONLY)).st_size,
    relative_to_a_file=lambda root: os.stat("file", dir_fd=os.open(root / FILE, os.O_RDONLY)),
    fchdir=lambda root: call("fchdir", os.open(root / DIRECTORY, os.O_RDONLY)),
)

OFFSETS = (0, 1, 4095, 4096, SIZES[FILE] - 1, SIZES[FILE], SIZES[FILE] + 1, 1 << 40, (1 << 63) - 4097, -1, -(1 << 62))
SEEKS = [offset for offset in OFFSETS if abs(offset) < 1 << 62]
"""How large a file may be differs from one file system to the other."""
WHENCE = (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)


def digest(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()[:16]


def read_at(name: str, size: int) -> Callable[[Root], object]:
    """What is read at each offset."""

    def reads(root: Root) -> list[str]:
        with root.opened(name) as descriptor:
            return outcomes(lambda offset: digest(os.pread(descriptor, size, offset)), OFFSETS)

    return reads


def with_file(act: Callable[[int], object], name: str = FILE) -> Callable[[Root], object]:
    def tried(root: Root) -> object:
        with root.opened(name) as descriptor:
            return act(descriptor)

    return tried


def seeks(name: str) -> Callable[[Root], object]:
    return with_file(
        lambda descriptor: outcomes(lambda to: os.lseek(descriptor, *to), itertools.product(SEEKS, WHENCE)), name
    )


def holes(descriptor: int) -> list[str]:
    """Whether data and holes can be looked for, and the end is where they end."""
    size = os.fstat(descriptor).st_size
    return outcomes(lambda to: os.lseek(descriptor, *to), itertools.product((0, size - 1, size), (3, 4)))


def in_pieces(descriptor: int) -> object:
    """Read to the end, by pieces of odd sizes and into several buffers at once."""
    whole = b"".join(iter(lambda: os.read(descriptor, 777), b""))
    buffers = [bytearray(1), bytearray(5000), bytearray(0), bytearray(3)]
    count = os.preadv(descriptor, buffers, 100)
    return digest(whole), count, digest(b"".join(buffers)), os.readv(descriptor, buffers)


def advice(descriptor: int) -> list[str]:
    return outcomes(partial(os.posix_fadvise, descriptor, 0, 0), (*range(6), 99))


cases(
    "read",
    short=read_at(FILE, 100),
    long=read_at(FILE, 1 << 20),
    nothing=read_at(FILE, 0),
    big=read_at(BIG, 1 << 21),
    empty=read_at(EMPTY, 10),
    sparse=read_at("sparse", 1 << 16),
    seeks=seeks(FILE),
    seeks_of_nothing=seeks(EMPTY),
    holes=with_file(holes),
    holes_of_a_sparse_file=with_file(holes, "sparse"),
    holes_of_nothing=with_file(lambda descriptor: outcome(lambda: os.lseek(descriptor, 0, 3)), EMPTY),
    unknown_seek=with_file(lambda descriptor: os.lseek(descriptor, 0, 99)),
    in_pieces=with_file(in_pieces),
    big_in_pieces=with_file(in_pieces, BIG),
    to_nowhere=with_file(lambda descriptor: checked(libc.pread(descriptor, ctypes.c_void_p(1), 100, 0))),
    with_unknown_flags=with_file(lambda descriptor: os.preadv(descriptor, [bytearray(10)], 0, 1 << 20)),
    ahead=with_file(lambda descriptor: call("readahead", descriptor, 0, 1 << 20), BIG),
    ahead_of_nothing=with_file(lambda descriptor: call("readahead", descriptor, 1 << 40, 10), EMPTY),
    advice=with_file(advice),
)


def sent(descriptor: int) -> object:
    """A file that goes to a pipe and a socket without a buffer."""
    receiver, sender = os.pipe()
    ours, theirs = socket.socketpair()
    spliced = os.splice(descriptor, sender, 5000, offset_src=123)
    piped = os.read(receiver, 5000)
    count = os.sendfile(theirs.fileno(), descriptor, 456, 5000)
    return (
        spliced,
        digest(piped),
        count,
        digest(ours.recv(5000)),
        outcome(lambda: os.sendfile(sender, descriptor, 1 << 40, 1)),
    )


def copied(root: Root) -> object:
    """A file that is copied elsewhere by the kernel."""
    with root.opened(BIG) as descriptor, tempfile.TemporaryFile(dir=root.scratch) as target:
        done = 0
        while count := os.copy_file_range(descriptor, target.fileno(), 1 << 20, done, done):
            done += count
        target.seek(0)
        return digest(target.read()), outcome(lambda: fcntl.ioctl(target, 0x40049409, descriptor))


cases("copy", splice_and_sendfile=with_file(sent), range=copied)


def lock(kind: int, length: int = 0) -> bytes:
    return struct.pack("=hhqqi4x", kind, 0, 0, length, 0)


def locked(root: Root) -> list[str]:
    """Locks of two descriptions of one file."""
    with root.opened() as one, root.opened() as other:
        wait_not = fcntl.LOCK_NB
        calls = [
            lambda: fcntl.flock(one, fcntl.LOCK_SH | wait_not),
            lambda: fcntl.flock(other, fcntl.LOCK_SH | wait_not),
            lambda: fcntl.flock(other, fcntl.LOCK_EX | wait_not),
            lambda: fcntl.flock(one, fcntl.LOCK_UN),
            lambda: fcntl.flock(other, fcntl.LOCK_EX | wait_not),
            lambda: fcntl.flock(one, fcntl.LOCK_SH | wait_not),
            lambda: fcntl.fcntl(one, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 10, 0)) != b"",
            lambda: fcntl.fcntl(one, fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 10, 0)),
            lambda: fcntl.fcntl(other, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 10, 0)) != b"",
            lambda: fcntl.fcntl(one, fcntl.F_SETLEASE, fcntl.F_RDLCK),
            lambda: fcntl.fcntl(one, fcntl.F_SETLEASE, fcntl.F_WRLCK),
        ]
        return [outcome(one_call) for one_call in calls]


def watched(root: Root) -> object:
    """What is told of opening, reading and closing a file."""
    watcher = call("inotify_init")
    events = 0x1 | 0x10 | 0x20  # access, close, open
    call("inotify_add_watch", watcher, os.fsencode(root / FILE), events)
    with root.opened() as descriptor:
        os.read(descriptor, 10)
    seen, content = [], os.read(watcher, 4096)
    while content:
        _, mask, _, length = struct.unpack_from("=iIII", content)
        seen.append(mask)
        content = content[16 + length :]
    return seen, outcome(lambda: call("inotify_add_watch", watcher, os.fsencode(root / MISSING), events))


def asked(number: int, size: int = 64) -> Callable[[Root], object]:
    """An ioctl that file systems answer."""
    return with_file(lambda descriptor: len(fcntl.ioctl(descriptor, number, bytes(size))))


def polled(descriptor: int) -> object:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLOUT)
    return poll.poll(0)[0][1], [len(part) for part in select.select([descriptor], [descriptor], [], 0)]


cases(
    "descriptor",
    locks=locked,
    inotify=watched,
    poll=with_file(polled),
    epoll=with_file(lambda descriptor: select.epoll().register(descriptor)),
    flags=asked(_GET_FLAGS, 8),
    extents=asked(_FIEMAP, 32),
    terminal=asked(_TCGETS, 64),
    block_size=asked(_BLOCK_SIZE, 4),
    handle=lambda root: call(
        "name_to_handle_at",
        -100,
        os.fsencode(root / FILE),
        struct.pack("=Ii", 128, 0) + bytes(128),
        ctypes.byref(ctypes.c_int()),
        0,
    ),
    link_of_a_descriptor=lambda root: call(
        "linkat", os.open(root / FILE, os.O_PATH), b"", -100, os.fsencode(f"{root.scratch}/linked"), AT_EMPTY_PATH
    ),
    execute=lambda root: os.execv(root / FILE, ["file"]),
    swap=lambda root: call("swapon", os.fsencode(root / BIG), 0),
    quota=lambda root: syscall(179, 0x80000700, os.fsencode(root.path), 0, None),
)
