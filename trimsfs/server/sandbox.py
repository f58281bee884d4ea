"""The sandbox: a server drops root, capabilities, write access to most files, and system calls that it does not need.

Under root's keeper, a server loads its code and credentials as root. It drops root before it reads from a network or
answers a request. The keeper does what needs privileges later.
"""

import contextlib
import ctypes
import errno
import logging
import os
import pwd
import resource
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trimsfs.errors import CacheUnusableError, ConfigurationError
from trimsfs.options import FLEET_REPORTS, FLEET_SOCKET
from trimsfs.text import or_free_space

try:
    import pyseccomp
except RuntimeError:  # libseccomp is missing
    pyseccomp = None

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 8, 24, 38
CAP_DAC_READ_SEARCH = 2
"""The capability to read any file and to enter any directory."""
CAP_SYS_PTRACE = 19
"""The capability to look at the processes of others."""
_CAPABILITY_VERSION = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3 of <linux/capability.h>."""
_TIOCSTI, _CLONE_NEWUSER = 0x5412, 0x10000000
RLIMIT_NICE, HIGHEST_NICE = 13, 40
"""The limit up to which an unprivileged process may raise its priority, and the highest value of it."""
_LAST_CAPABILITY = Path("/proc/sys/kernel/cap_last_cap")

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
# The LANDLOCK_ACCESS_FS_* that change files or directories. REFER needs version 2, TRUNCATE version 3.
_WRITE_FILE, _REMOVE_AND_MAKE, _REFER, _TRUNCATE = 1 << 1, 0x1FF << 4, 1 << 13, 1 << 14
_SCOPE_SIGNAL = 1 << 1
"""LANDLOCK_SCOPE_SIGNAL, which needs version 6."""

_CACHE_ENTRIES = {
    *("blobs", "lock", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "index.sqlite-journal"),
    *("index.sqlite-damaged", "index.sqlite-damaged-wal", "index.sqlite-damaged-shm"),
    *("trimsfs.log", "trimsfs.log.1", "trimsfs.log.2", FLEET_SOCKET, FLEET_REPORTS),
}
"""The names that a cache directory may hold; earlier versions kept their logs there."""

_DENIED = """
    acct add_key adjtimex bpf chroot clock_adjtime clock_settime delete_module finit_module fsconfig fsmount fsopen
    fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load
    keyctl lookup_dcookie mount mount_setattr move_mount move_pages name_to_handle_at open_by_handle_at open_tree
    perf_event_open personality pidfd_getfd pivot_root process_vm_readv process_vm_writev ptrace quotactl
    quotactl_fd reboot request_key setdomainname sethostname setns settimeofday swapoff swapon syslog umount2
    unshare userfaultfd vhangup
"""
"""System calls that a server never makes, but an attacker in it might."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The user that a server becomes."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def identity(user: str) -> Identity:
    """Look up a user by name or number; a number need not be in the password file.

    Raises ConfigurationError for an unknown name.
    """
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        if not user.isdecimal():
            raise ConfigurationError(
                f"option --server-user {user}: no such user: run `useradd --system {user}`"
            ) from None
        return Identity(name=f"uid {user}", uid=int(user), gid=int(user))
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Identity(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid, groups=groups)


def give(directory: Path, to: Identity) -> None:
    """Create a cache directory, or give it and its content to a user, unless they own it already.

    Another server may still use it: it makes no file in what is given, but removes some meanwhile. Raises
    CacheUnusableError, also if the directory holds anything but a cache.
    """
    try:
        for missing in [above for above in reversed(directory.parents) if not above.exists()]:
            missing.mkdir(exist_ok=True)
            missing.chmod(0o755)  # whatever the umask: the user must be able to enter
        directory.mkdir(mode=0o700, exist_ok=True)
        if directory.stat().st_uid == to.uid:
            return
        entries = set(os.listdir(directory)) - {"lost+found"}
        if not entries <= _CACHE_ENTRIES:
            strange = sorted(entries - _CACHE_ENTRIES)[0]
            raise CacheUnusableError(f"cache directory {directory}: holds {strange!r}: choose an empty one")
        for name in entries:
            with contextlib.suppress(FileNotFoundError):
                os.chown(directory / name, to.uid, to.gid, follow_symlinks=False)
        if "blobs" in entries:
            for _, directories, files, descriptor in os.fwalk(directory / "blobs"):
                for name in (*directories, *files):
                    with contextlib.suppress(FileNotFoundError):
                        os.chown(name, to.uid, to.gid, dir_fd=descriptor, follow_symlinks=False)
        os.chown(directory, to.uid, to.gid)  # last: a failure before is mended by the next start
    except OSError as error:
        remedy = or_free_space(error, "set --cache-dir or --server-user")
        raise CacheUnusableError(f"{directory}: {error.strerror}: {remedy}") from error


def raised(limit: int, value: int) -> bool:
    """Raise a limit of this process; False if it lacks CAP_SYS_RESOURCE, as root does in some containers."""
    try:
        resource.setrlimit(limit, (value, value))
    except ValueError:
        return False
    return True


def become(user: Identity, *, keep: int | None = None) -> None:
    """Become a user for good, without capabilities except *keep*, if this root has it. For root, with one thread.

    Raises ConfigurationError if this root may not become that user.
    """
    if user.uid == 0:
        return
    raised(resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY)  # to lock models in memory
    try:
        for capability in range(int(_LAST_CAPABILITY.read_text()) + 1):
            _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
        _libc.prctl(_PR_SET_KEEPCAPS, ctypes.c_ulong(keep is not None), 0, 0, 0)
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        if keep is not None and not _hold(1 << keep):
            _hold(0)
        # As after an exec: this user, not root, then owns this process's files in /proc.
        _libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(1), 0, 0, 0)
    except OSError as error:
        raise ConfigurationError(
            f"option --server-user: cannot become {user.name}: {error.strerror}: "
            "let the container have SETUID and SETGID, or set --server-user root"
        ) from error


def keep_only(*capabilities: int) -> None:
    """Give up all other capabilities for good, and stay root. For a process with one thread."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)
    if not _hold(sum(1 << capability for capability in capabilities)):
        _hold(0)


def _hold(capabilities: int) -> bool:
    """Keep only these capabilities, a bit mask; False if this process lacks them."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    held: int = _libc.capset(header, struct.pack("=6I", capabilities, capabilities, 0, 0, 0, 0))
    return held == 0


def fence(writable: Iterable[Path]) -> None:
    """Restrict this process and its children for good, by landlock and seccomp.

    They gain no privileges by exec, and write only to *writable* paths and what is below, /proc and /dev/null. They
    neither trace nor signal processes outside the fence, nor make system calls of root. Logs what the host lacks.
    """
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)
    try:
        _restrict_writing(writable)
    except OSError as error:
        log.info("sandbox without landlock: %s", error.strerror)
    try:
        _restrict_calls()
    except (OSError, RuntimeError) as error:
        log.info("sandbox without seccomp: %s", error)


def set_apart(writable: Iterable[Path]) -> None:
    """Keep this process, behind the `fence`, from tracing and signalling others behind the same one."""
    with contextlib.suppress(OSError):  # no landlock: `fence` has logged it
        _restrict_writing(writable)


def _restrict_writing(writable: Iterable[Path]) -> None:
    """Restrict, by landlock, which files may be written. Raises OSError."""
    version = _landlock(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    rights = _WRITE_FILE | _REMOVE_AND_MAKE | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("=QQQ", rights, 0, _SCOPE_SIGNAL) if version >= 6 else struct.pack("=Q", rights)
    ruleset = _landlock(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in (*writable, Path("/proc"), Path("/dev/null")):
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # it is missing, or its disk fails: no write would succeed
            try:
                directory = stat.S_ISDIR(os.fstat(place).st_mode)
                # The kernel rejects rights of directories for a file.
                rule = struct.pack("=Qi", rights if directory else rights & (_WRITE_FILE | _TRUNCATE), place)
                _landlock(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)
            finally:
                os.close(place)
        _landlock(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _landlock(number: int, *arguments: int | bytes | None) -> int:
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _libc.syscall(number, *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _restrict_calls() -> None:
    """Deny system calls by seccomp. Raises OSError, and RuntimeError without libseccomp."""
    if pyseccomp is None:
        raise RuntimeError("libseccomp is not installed")
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED.split():
        with contextlib.suppress(OSError, ValueError):  # unknown to this architecture or libseccomp
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    # Deny typing into the terminal of root's shell, and new user namespaces. Without clone3, libc uses clone.
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, _TIOCSTI))
    new_user = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_NEWUSER, _CLONE_NEWUSER)
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", new_user)
    with contextlib.suppress(OSError, ValueError):
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.load()


def hindrance(path: Path) -> str | None:
    """Why this process cannot enter a directory, for messages; None if it can."""
    for above in (*reversed(path.parents), path):
        if os.access(above, os.F_OK) and not os.access(above, os.X_OK):
            return f"the server, uid {os.getuid()}, may not enter {above}"
    return None
