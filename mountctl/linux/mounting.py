"""Mounting and unmounting FUSE file systems, and the settings that belong to a mount."""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mountctl.linux import child_process
from mountctl.linux.child_process import HangsError
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, trimsfs_at

READ_AHEAD_KIB = 16384
"""With the kernel's default of 128 KiB, every read waits for the latency of the store."""
CONNECTIONS = Path("/sys/fs/fuse/connections")
APPARMOR_PROFILE = Path("/etc/apparmor.d/fusermount3")
"""Lets fusermount3 mount in some directories only, such as those of users. Debian has it since 13, Ubuntu 25.04."""

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOATIME = 1, 2, 4, 1024
_UMOUNT_NOFOLLOW = 8
_MNT_DETACH = 2

# FUSE_DEV_IOC_BACKING_OPEN and _CLOSE of <linux/fuse.h>
_BACKING_OPEN = 1 << 30 | 16 << 16 | 229 << 8 | 1
_BACKING_CLOSE = 1 << 30 | 4 << 16 | 229 << 8 | 2

_libc = ctypes.CDLL(None, use_errno=True)


class FuseUnavailableError(Exception):
    """The host or the user cannot mount FUSE file systems."""


class MountpointError(Exception):
    """The mount point cannot be mounted on."""


@dataclass(frozen=True, slots=True)
class MountIdentity:
    """Identifies a FUSE file system, also among those that are mounted at its mount point later.

    ``device`` is ``major:minor``, which the kernel reuses as soon as the file system is unmounted. ``control`` is the
    inode number of the connection's directory in fusectl, which tells them apart; None without fusectl.
    """

    device: str
    control: int | None

    def is_at(self, mountpoint: Path) -> bool:
        """Whether this file system is mounted at exactly this path, with nothing over it."""
        identity = identify(mountpoint)
        return (
            identity is not None
            and identity.device == self.device
            and (identity.control == self.control or None in (identity.control, self.control))
        )


def identify(mountpoint: Path) -> MountIdentity | None:
    """The trimsfs file system that is mounted at exactly this path, found without touching it."""
    mounted = trimsfs_at(mountpoint)
    if mounted is None:
        return None
    _mount_fusectl()
    try:
        control = os.stat(_control_files(mounted.device)).st_ino
    except OSError:
        control = None
    return MountIdentity(mounted.device, control)


def mount(mountpoint: Path, *, source: str, allow_other: bool) -> int:
    """Mount a FUSE file system with ro, nosuid and nodev; the /dev/fuse descriptor.

    By mount(2) for root, else by fusermount3. Raises FuseUnavailableError, MountpointError.
    """
    if os.geteuid() != 0:
        return _mount_by_fusermount(mountpoint, source, allow_other)
    descriptor = _open_fuse()
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id={os.getegid()},default_permissions"
    if allow_other:
        options += ",allow_other"
    result = _libc.mount(
        source.encode(errors="surrogateescape"),
        os.fsencode(mountpoint),
        FILE_SYSTEM_TYPE.encode(),
        ctypes.c_ulong(_MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOATIME),
        options.encode(),
    )
    if result != 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        if number == errno.EPERM:
            raise FuseUnavailableError(
                f"mount {mountpoint}: {os.strerror(number)}: "
                "root lacks CAP_SYS_ADMIN (in a container: --cap-add SYS_ADMIN)"
            )
        raise MountpointError(f"mount {mountpoint}: {os.strerror(number)}")
    return descriptor


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount; *lazy* detaches it now, even if it is busy. Raises OSError."""
    if os.geteuid() == 0:
        flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
        if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(mountpoint))
        return
    try:
        program = _fusermount()
    except FuseUnavailableError as error:
        raise OSError(errno.ENOENT, str(error), str(mountpoint)) from None
    command = [program, "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise OSError(0, done.stderr.strip().removeprefix(f"{program}: "), str(mountpoint))


def answers(mountpoint: Path, *, timeout_s: float) -> bool | None:
    """Whether a mount answers: False if nobody has its connection, None if it hangs."""
    try:
        done = child_process.run(["stat", "-f", "--", mountpoint], timeout_s)
    except HangsError:
        return None
    return "not connected" not in done.stderr


def detach_dead(mountpoint: Path, *, timeout_s: float) -> bool:
    """Detach the mounts at a mount point whose keeper and server have both ended; whether there was one.

    Raises OSError.
    """
    detached = False
    while trimsfs_at(mountpoint) is not None and answers(mountpoint, timeout_s=timeout_s) is False:
        unmount(mountpoint, lazy=True)
        detached = True
    return detached


def tune(device: str) -> list[str]:
    """Raise a file system's read-ahead; what could not be set, and why.

    Call it after the INIT handshake, which resets the read-ahead.
    """
    path = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    try:
        path.write_text(str(READ_AHEAD_KIB))
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    return []


def open_backing(connection: int, file: int) -> int:
    """Register a backing file of a FUSE connection, both by descriptor; its id. Raises OSError.

    The kernel gets a descriptor that only names the file. What it holds is no opener of the file, so a lease tells
    whether a program still maps it.
    """
    named = os.open(f"/proc/self/fd/{file}", os.O_PATH | os.O_CLOEXEC)
    try:
        number: int = fcntl.ioctl(connection, _BACKING_OPEN, bytearray(struct.pack("=iIQ", named, 0, 0)), True)
    finally:
        os.close(named)
    return number


def close_backing(connection: int, number: int) -> None:
    """Unregister a backing file. Raises OSError."""
    fcntl.ioctl(connection, _BACKING_CLOSE, struct.pack("=I", number))


def abort(mountpoint: Path) -> None:
    """Abort the FUSE connection of a mount: requests that wait fail. Raises OSError, LookupError."""
    mounted = trimsfs_at(mountpoint)
    if mounted is None:
        raise LookupError(f"{mountpoint}: no trimsfs mount")
    abort_device(mounted.device)


def abort_device(device: str) -> None:
    """Abort a FUSE connection by the device of its file system, wherever that is mounted. Raises OSError."""
    _mount_fusectl()
    (_control_files(device) / "abort").write_text("1")


def _control_files(device: str) -> Path:
    return CONNECTIONS / device.partition(":")[2]


def _mount_fusectl() -> None:
    """Mount fusectl if it is not mounted, as it is on hosts with systemd."""
    with contextlib.suppress(OSError):
        if os.geteuid() == 0 and not any(CONNECTIONS.iterdir()):
            _libc.mount(b"fusectl", os.fsencode(CONNECTIONS), b"fusectl", ctypes.c_ulong(0), None)


def _open_fuse() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FuseUnavailableError("/dev/fuse does not exist: load the module with `modprobe fuse`") from None
    except OSError as error:
        raise FuseUnavailableError(f"/dev/fuse: {error.strerror}: give this user or container access to it") from None


def _fusermount() -> str:
    import shutil  # noqa: PLC0415 - root's keepers do not need it, and it takes memory

    path = shutil.which("fusermount3")
    if path is None:
        raise FuseUnavailableError("fusermount3 is not installed: install the package fuse3, or mount as root")
    return path


def _mount_by_fusermount(mountpoint: Path, source: str, allow_other: bool) -> int:
    # fusermount3 splits its options at commas that no backslash escapes.
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    program = _fusermount()
    options = f"ro,nosuid,nodev,noatime,default_permissions,subtype=trimsfs,fsname={name}"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                [program, "-o", options, "--", str(mountpoint)],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FuseUnavailableError("fusermount3 did not return in 30 s") from None
        if done.returncode != 0:
            message = done.stderr.strip().removeprefix(f"{program}: ")
            if "user_allow_other" in message:
                message += ", or mount with --no-allow-other"
            if "mount failed: Permission denied" in message and APPARMOR_PROFILE.exists():
                rules = APPARMOR_PROFILE.parent / "local" / APPARMOR_PROFILE.name
                message += (
                    ": if AppArmor forbids it (dmesg), choose a mount point below the home directory, "
                    f"or add a rule to {rules}"
                )
            kind = FuseUnavailableError if "/dev/fuse" in message else MountpointError
            raise kind(f"fusermount3: {message}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise FuseUnavailableError("fusermount3 sent no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
