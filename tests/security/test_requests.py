"""What a user without rights may ask of a mount: names, reads, attributes and ioctls that make no sense."""

import ctypes
import errno
import mmap
import os
import random
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mountctl.keeper.control_socket import ask
from tests.security.names import check_log
from tests.security.processes import processes
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.processes import family
from tests.support.survival import Survived
from tests.support.users import STRANGER, as_user

MIB = 1 << 20
NAMES = [
    *(b"..", b".", b".trims", b"x" * 255, b"x" * 256, b"\xff\xfe", b"new\nline", b"\x1b[2J", b"%s%n%p", b"-rf"),
    *(b"info", b"info ", b"INFO", b"tensors", b"shared", b"gpu", b"gpu/", b"derived-0-0", b"derived-3003-0"),
    *(b"derived-99999999999-0", b"derived-\xd9\xa3-0", b"derived--1-0", b"derived-3003-\xc2\xb2", b"pin", b"evict"),
    *(b"warm-", b"warm-disk", b"warm-GPU-0", b"warm-4294967296~GPU-0", b"warm--1~GPU-0", b"warm-1~2~GPU"),
    b"verify-gpu",
    *(b"GPU-0@%", b"GPU-0@%2", b"GPU-0.ipc@[", b"GPU-0@" + b"*" * 200, b"control", b"metrics", b"models"),
]
DIRECTORIES = [
    *(b"", b"dir", b".trims", b".trims/.trims", b".trims/model", b"dir/.trims/model", b".trims/model/gpu", b"model"),
]
OFFSETS = [0, 1, 4095, 1 << 31, (1 << 32) + 1, 1 << 62, (1 << 63) - 4097, -1]
ATTRIBUTES = [
    *("user.trims.", "user.trims.x", "user.trims.etag", "user.trims.tensors", "user.trims." + "x" * 240, "user.x"),
    *("user.trims.gpu..ipc_handle", "user.trims.gpu.GPU-0.ipc_handle", "user.trims.gpu.\udcff.ipc_handle"),
    *("security.capability", "security.selinux", "system.posix_acl_access", "trusted.x", "nothing", "user."),
]
COMMANDS = [0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0xFF]
"""Numbers of ioctls, most of which are known."""
REFUSALS = {
    *("EACCES", "EPERM", "ENOENT", "EINVAL", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ENOTTY", "EFAULT", "EBUSY"),
    *("ENODEV", "ERANGE", "E2BIG", "EOPNOTSUPP", "EROFS", "ENODATA", "EBADF", "ENOSPC", "EIO", "ENOMEM"),
    *("ESPIPE", "EOVERFLOW"),
}
"""Every way to be told no. EIO is for ioctls of which the kernel takes no answer."""

_libc = ctypes.CDLL(None, use_errno=True)


class Counting:
    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()
        self.operations = 0

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        self.operations += 1
        try:
            function(*arguments)
        except OSError as error:
            self.errors[errno.errorcode[error.errno or 0]] += 1
        except ValueError:  # Python itself refuses it
            self.errors["EINVAL"] += 1


def ask_for_names(root: bytes) -> Counting:
    """Every name in every kind of directory; what can be opened is read at odd places and in odd sizes."""
    counting = Counting()
    for directory in DIRECTORIES:
        for name in NAMES:
            path = os.path.join(root, directory, name)
            counting.call(os.stat, path)
            counting.call(os.listdir, path)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                counting.errors[errno.errorcode[error.errno or 0]] += 1
                continue
            try:
                for offset in OFFSETS:
                    for size in (0, 1, 5 * MIB):
                        counting.call(os.pread, descriptor, size, offset)
                counting.call(mmap.mmap, descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
                counting.call(os.pwrite, descriptor, b"x", 0)
                counting.call(os.lseek, descriptor, -1, os.SEEK_END)
            finally:
                os.close(descriptor)
    return counting


def ask_for_attributes(root: bytes) -> Counting:
    """Every attribute of every kind of file, into rooms of odd sizes."""
    counting = Counting()
    room = ctypes.create_string_buffer(1 << 20)

    def get(path: bytes, name: bytes, size: int, pointer: object) -> None:
        if _libc.getxattr(path, name, pointer, ctypes.c_size_t(size)) < 0:
            raise OSError(ctypes.get_errno(), "getxattr")

    for path in (
        os.path.join(root, directory) for directory in (*DIRECTORIES, b".trims/control", b".trims/model/info")
    ):
        counting.call(os.listxattr, path)
        for name in map(os.fsencode, ATTRIBUTES):
            for size in (0, 1, 65536, 1 << 20):
                counting.call(get, path, name, size, room)
            counting.call(get, path, name, 64, ctypes.c_void_p(1))
            counting.call(os.setxattr, path, name, b"x" * 100)
            counting.call(os.removexattr, path, name)
    return counting


def send_ioctls(root: bytes, seed: int, count: int) -> Counting:
    """Ioctls at random: known numbers and others, of any size and direction, with pointers that lead anywhere."""
    draw, counting = random.Random(seed), Counting()
    room = ctypes.create_string_buffer(1 << 15)
    paths = [os.path.join(root, name) for name in (b"model", b"small", b".trims/control", b".trims/model/info", b"dir")]
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]

    def send(descriptor: int, command: int, argument: object) -> None:
        if _libc.ioctl(descriptor, ctypes.c_ulong(command), argument) < 0:
            raise OSError(ctypes.get_errno(), "ioctl")

    for _ in range(count):
        size = draw.choice([0, 1, 4, 8, 32, 240, 16376, 16383, draw.randrange(1 << 14)])
        command = draw.randrange(4) << 30 | size << 16 | ord("t") << 8 | draw.choice(COMMANDS)
        if draw.random() < 0.1:
            command = draw.randrange(1 << 32)
        if draw.random() < 0.5:
            ctypes.memmove(room, draw.randbytes(1 << 14), 1 << 14)
        else:  # nearly a piece of what has been derived, or a request for a GPU
            words = [draw.choice([0, 1, 16352, MIB, (1 << 64) - 1, draw.getrandbits(64)]) for _ in range(2)]
            numbers = draw.choice([0, 16352, (1 << 32) - 1]), draw.choice([0, 3, 4])
            ctypes.memmove(room, struct.pack("=QQII", *words, *numbers), 24)
        pointer = draw.choice([room, ctypes.c_void_p(0), ctypes.c_void_p(1), ctypes.c_void_p((1 << 64) - 4096)])
        counting.call(send, draw.choice(descriptors), command, pointer if draw.random() < 0.4 else room)
    for descriptor in descriptors:
        os.close(descriptor)
    return counting


def open_descriptors(mount: MountedStore) -> int:
    """Of all processes of a mount."""
    count = 0
    for pid in family(mount.control()["keeper_pid"]):
        with suppress(FileNotFoundError):  # it has ended
            count += len(os.listdir(f"/proc/{pid}/fd"))
    return count


def test_requests_that_make_no_sense_are_refused(store_directory: Path, tmp_path: Path, survived: Survived) -> None:
    content = random.Random(1).randbytes(2 * MIB)
    (store_directory / "model").write_bytes(content)
    (store_directory / "small").write_bytes(b"weights")
    (store_directory / "dir").mkdir()
    (store_directory / "dir/model").write_bytes(content)
    total = Counting()
    with mounted(store_directory, tmp_path, "--log-level", "warning") as mount:
        root = os.fsencode(mount.path)
        for name in ("model", "small", "dir/model"):  # whose opens are passed through from then on
            assert (mount.path / name).read_bytes()
        wait_until(lambda: bool(ask(mount.path, {"do": "status"}, timeout_s=5)["standby"]), 30)
        before, (lasting, passing) = open_descriptors(mount), processes(mount)
        for attempt in (ask_for_names, ask_for_attributes, lambda root: send_ioctls(root, 7, 1500)):
            counting: Counting = as_user(STRANGER, lambda attempt=attempt: attempt(root))  # type: ignore[misc]
            total.errors += counting.errors
            total.operations += counting.operations
        still, left = processes(mount)
        assert still == lasting
        assert left <= passing
        assert mount.metrics()["trimsfs_server_restarts_total"] == 0
        wait_until(lambda: open_descriptors(mount) <= before)
        wrong = sum((mount.path / name).read_bytes() != content for name in ("model", "dir/model"))
        assert not mount.info("model")["pinned"]
        assert "Traceback" not in mount.log()
        check_log(mount.log())
    survived(
        "requests that make no sense",
        injected=total.operations,
        operations=total.operations,
        errors=total.errors,
        allowed=REFUSALS,
        wrong=wrong,
    )
