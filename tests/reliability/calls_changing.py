"""Calls that would change something, each of which a read-only file system refuses in its own way."""

import os
import socket
import stat
from collections.abc import Callable
from functools import partial

from tests.reliability.calls import DIRECTORY, EMPTY, FILE, MISSING, Root, cases, outcome, outcomes
from tests.reliability.syscalls import AT_REMOVEDIR, O_TMPFILE, call, renameat2

NEW, NEW_BELOW, BELOW_FILE, BELOW_MISSING = "new", "dir/new", "dir/file/new", "dir/missing/new"
NAMES = (FILE, DIRECTORY, NEW, NEW_BELOW, BELOW_FILE, BELOW_MISSING, "n" * 256)
CREATE = os.O_CREAT | os.O_WRONLY


def on_each(names: tuple[str, ...], act: Callable[[Root, str], object]) -> Callable[[Root], object]:
    """What an act comes to on each name, told as one."""

    return lambda root: outcomes(partial(act, root), names)


def opening(flags: int) -> Callable[[Root], object]:
    """Opening each name, and closing it: whether it can be."""
    return on_each(NAMES, lambda root, name: os.close(os.open(root / name, flags, 0o600)))


cases(
    "open",
    write=opening(os.O_WRONLY),
    read_and_write=opening(os.O_RDWR),
    neither=opening(os.O_WRONLY | os.O_RDWR),
    truncate=opening(os.O_WRONLY | os.O_TRUNC),
    truncate_for_reading=opening(os.O_RDONLY | os.O_TRUNC),
    append=opening(os.O_WRONLY | os.O_APPEND),
    append_for_reading=opening(os.O_RDONLY | os.O_APPEND),
    create=opening(CREATE),
    create_for_reading=opening(os.O_CREAT),
    create_anew=opening(CREATE | os.O_EXCL),
    create_a_directory=opening(os.O_CREAT | os.O_DIRECTORY),
    write_synchronously=opening(os.O_WRONLY | os.O_SYNC),
    temporary=opening(O_TMPFILE | os.O_RDWR),
)
cases(
    "by name",
    truncate=on_each(NAMES, lambda root, name: os.truncate(root / name, 0)),
    truncate_below_zero=lambda root: call("truncate", os.fsencode(root / FILE), -1),
    unlink=on_each(NAMES, lambda root, name: os.unlink(root / name)),
    unlink_with_a_slash=on_each((FILE, DIRECTORY, NEW), lambda root, name: os.unlink(root / f"{name}/")),
    rmdir=on_each((*NAMES, "empty-dir", "dir/."), lambda root, name: os.rmdir(root / name)),
    unlinkat=lambda root: call("unlinkat", -100, os.fsencode(root / DIRECTORY), AT_REMOVEDIR),
    mkdir=on_each((*NAMES, "new/", "."), lambda root, name: os.mkdir(root / name)),
    mknod=on_each(NAMES, lambda root, name: os.mknod(root / name, stat.S_IFREG | 0o600)),
    mkfifo=on_each(NAMES, lambda root, name: os.mkfifo(root / name)),
    device=on_each(NAMES, lambda root, name: os.mknod(root / name, stat.S_IFCHR | 0o600, os.makedev(1, 3))),
    symlink=on_each(NAMES, lambda root, name: os.symlink("target", root / name)),
    link=on_each(NAMES, lambda root, name: os.link(root / FILE, root / name)),
    link_of_what_is_missing=lambda root: os.link(root / MISSING, root / NEW),
    link_from_elsewhere=lambda root: os.link(f"{root.scratch}/mine", root / NEW),
    link_to_elsewhere=lambda root: os.link(root / FILE, f"{root.scratch}/linked"),
    bind=on_each((FILE, NEW, BELOW_FILE), lambda root, name: bound(root / name)),
)
cases(
    "rename",
    to=on_each(NAMES, lambda root, name: os.rename(root / FILE, root / name)),
    of=on_each((*NAMES, EMPTY), lambda root, name: os.rename(root / name, root / FILE)),
    below_itself=lambda root: os.rename(root / DIRECTORY, root / NEW_BELOW),
    from_elsewhere=lambda root: os.rename(f"{root.scratch}/mine", root / NEW),
    to_elsewhere=lambda root: os.rename(root / FILE, f"{root.scratch}/renamed"),
    exchange=lambda root: renameat2(root / FILE, root / EMPTY, 2),
    no_replace=lambda root: renameat2(root / FILE, root / EMPTY, 1),
    unknown_flag=lambda root: renameat2(root / FILE, root / EMPTY, 1 << 20),
)
cases(
    "attributes",
    chmod=on_each(NAMES, lambda root, name: os.chmod(root / name, 0o777)),
    chown=on_each(NAMES, lambda root, name: os.chown(root / name, 1, 1)),
    chown_to_nobody_else=lambda root: os.chown(root / FILE, -1, -1),
    utime=on_each(NAMES, lambda root, name: os.utime(root / name)),
    utime_of_then=on_each(NAMES, lambda root, name: os.utime(root / name, (1, 1))),
    setxattr=on_each(NAMES, lambda root, name: os.setxattr(root / name, "user.mine", b"x")),
    setxattr_of_trusted=lambda root: os.setxattr(root / FILE, "trusted.mine", b"x"),
    setxattr_of_security=lambda root: os.setxattr(root / FILE, "security.mine", b"x"),
    setxattr_without_a_name=lambda root: os.setxattr(root / FILE, "user.", b"x"),
    setxattr_too_large=lambda root: os.setxattr(root / FILE, "user.mine", b"x" * 70_000),
    removexattr=on_each(NAMES, lambda root, name: os.removexattr(root / name, "user.mine")),
    may_write=on_each(NAMES, lambda root, name: call("access", os.fsencode(root / name), os.W_OK)),
    may_execute=on_each(NAMES, lambda root, name: call("access", os.fsencode(root / name), os.X_OK)),
)


def bound(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        os.chdir(os.path.dirname(path))
        end.bind(os.path.basename(path))


def by_descriptor(act: Callable[[int], object]) -> Callable[[Root], object]:
    """An act on an open file, and on an open directory."""

    def on_one(root: Root, name: str) -> str:
        with root.opened(name) as descriptor:
            return outcome(partial(act, descriptor))

    return on_each((FILE, DIRECTORY), on_one)


cases(
    "by descriptor",
    write=by_descriptor(lambda descriptor: os.write(descriptor, b"x")),
    write_nothing=by_descriptor(lambda descriptor: os.write(descriptor, b"")),
    pwrite=by_descriptor(lambda descriptor: os.pwrite(descriptor, b"x", 0)),
    pwritev=by_descriptor(lambda descriptor: os.pwritev(descriptor, [b"x"], 0)),
    truncate=by_descriptor(lambda descriptor: os.ftruncate(descriptor, 0)),
    allocate=by_descriptor(lambda descriptor: os.posix_fallocate(descriptor, 0, 1)),
    punch=by_descriptor(lambda descriptor: call("fallocate", descriptor, 3, 0, 4096)),
    chmod=by_descriptor(lambda descriptor: os.fchmod(descriptor, 0o777)),
    chown=by_descriptor(lambda descriptor: os.fchown(descriptor, 1, 1)),
    utime=by_descriptor(os.utime),
    setxattr=by_descriptor(lambda descriptor: os.setxattr(descriptor, "user.mine", b"x")),
    sync=by_descriptor(os.fsync),
    sync_data=by_descriptor(os.fdatasync),
    sync_all=by_descriptor(lambda descriptor: call("syncfs", descriptor)),
    sync_range=by_descriptor(lambda descriptor: call("sync_file_range", descriptor, 0, 0, 7)),
    copy_to_itself=by_descriptor(lambda descriptor: os.copy_file_range(descriptor, descriptor, 10, 0, 100)),
)
