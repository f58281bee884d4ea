"""Has a fork join the namespaces, the control group and the identity of a caller that may be in a container.

The kernel says what a caller is: by the socket, as it was when it connected, and by /proc. The fork runs nothing before
the kernel says the same of both.
"""

import ctypes
import os
import resource
import select
import socket
import stat
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from trimsfs.extras.spawn.caller import NAMESPACES, OF_SESSIONS, Status, content, matches
from trimsfs.extras.spawn.messages import peer, raised

OF_CONTAINERS = ("HOSTNAME", "container", "KUBERNETES_*")
OF_SERVICES = (
    *("NOTIFY_SOCKET", "JOURNAL_STREAM", "MEMORY_PRESSURE_*", "SYSTEMD_EXEC_PID", "RUNTIME_DIRECTORY", "LISTEN_*"),
)
"""Variables that differ between containers or services, and that no library reads when it is imported."""
_OWN = "TRIMSFS_SPAWN_*"
PEER_PIDFD = 77
"""``SO_PEERPIDFD``, of Linux 6.5."""
SECCOMP, CGROUP, LABEL = "seccomp", "cgroup", "label"
ALLOWABLE = (CGROUP, LABEL, SECCOMP)
"""What ``--allow`` takes: that a fork has the server's control group, or its label of AppArmor or SELinux; that filters
of the same number are the same filters."""
_NO_FILTERS = "0 0"
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_AMBIENT_RAISE, _AMBIENT_CLEAR = 2, 4
_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219}, 1
_CAPABILITIES_VERSION = 0x20080522
_MOST_CAPABILITIES = 64
_libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(Exception):
    """Why a caller gets no fork: the reason, for the caller."""


class Joining:
    """What callers of a server must have in common with it.

    That is *line*, its interpreter and options, and the variables that match none of *vary*. *allow* names what may
    differ between a fork and its caller; *first* is the lowest number of this server's descriptors.
    """

    def __init__(self, line: Sequence[str], vary: Sequence[str], allow: Sequence[str], first: int) -> None:
        self._first = first
        self._line = list(line)
        self._vary = (*OF_SESSIONS, *OF_CONTAINERS, *OF_SERVICES, _OWN, *vary)
        self._allow = frozenset(allow)
        self._environment = dict(os.environ)
        _control(_PR_SET_CHILD_SUBREAPER, 1)

    def peer(self, connection: socket.socket) -> "Peer":
        """The process that asks. Raises RefusedError if this server cannot tell which it is."""
        pid, user, group = peer(connection)
        if pid == 0:
            raise RefusedError("its process is in a PID namespace that the fork server cannot see: share that")
        try:
            pidfd = connection.getsockopt(socket.SOL_SOCKET, PEER_PIDFD)
        except OSError as error:
            raise RefusedError(f"the kernel does not tell which process asks, as Linux 6.5 does: {error}") from error
        return Peer(pid, raised(pidfd, self._first), user, group, allow=self._allow, first=self._first)

    def owns(self, connection: socket.socket) -> bool:
        """Whether a caller may end this server: its own user does, in its own namespaces."""
        pid, user, _ = peer(connection)
        if user != os.geteuid() or pid == 0:
            return False
        with suppress(OSError):
            return all(_namespace(str(pid), name) == _namespace("self", name) for name in ("user", "pid"))
        return False

    def check(self, order: Mapping[str, Any]) -> None:
        """In the fork: compare what its order says with this server. Raises RefusedError."""
        if order["interpreter"] != self._line:
            raise RefusedError(f"the fork server runs {' '.join(self._line)}")
        theirs = order["environment"]
        others = [
            name
            for name in sorted(theirs.keys() | self._environment.keys())
            if theirs.get(name) != self._environment.get(name)
            and not any(matches(name, pattern) for pattern in self._vary)
        ]
        if others:
            raise RefusedError(f"variables differ from the fork server's: give that --vary {','.join(others)}")


class Peer:
    """A caller: its process, and the user and the group that it had when it connected."""

    def __init__(self, pid: int, pidfd: int, user: int, group: int, *, allow: frozenset[str], first: int) -> None:
        """Raises RefusedError if this server may not look at the process."""
        self._pid = pid
        self._pidfd = pidfd
        self._user = user
        self._group = group
        self._allow = allow
        self._opened = [pidfd]
        try:
            for name in ("", "/root"):
                self._opened.append(raised(os.open(f"/proc/{pid}{name}", os.O_PATH | os.O_CLOEXEC), first))
            self._other = [name for name in NAMESPACES if _namespace(str(pid), name) != _namespace("self", name)]
            self._has_other_root = "mnt" in self._other or _place(self._opened[2]) != _place_of("self", "root")
        except OSError as error:
            self.close()
            raise RefusedError(f"the fork server may not look at pid {pid}: {error.strerror}") from error

    def close(self) -> None:
        """Look at the caller no more."""
        for descriptor in self._opened:
            os.close(descriptor)
        self._opened.clear()

    @property
    def enters_pid_namespace(self) -> bool:
        """Whether the caller has another PID namespace than this server."""
        return "pid" in self._other

    def join(self, order: Mapping[str, Any]) -> None:
        """In the fork: become what the caller is. Raises OSError.

        Only what this process forks then is in the caller's PID namespace: `enters_pid_namespace`.
        Nothing is read by a path once this process has another root: who made that may have put anything there.
        """
        _, process, root = self._opened
        for limit, _, hard in order["limits"]:
            if (own := resource.getrlimit(limit))[1] != resource.RLIM_INFINITY and not 0 <= hard <= own[1]:
                resource.setrlimit(limit, (own[0], hard))  # whoever this process is then may not raise it
        _renew_keyring()
        if flags := sum(NAMESPACES[name] for name in self._other):
            _set_namespaces(self._pidfd, flags)
        if self._has_other_root:
            os.fchdir(root)
            os.chroot(".")
        _take_identity(Status(directory=process).fields)  # as the caller's user namespace numbers users

    def place(self, fork: int) -> None:
        """Have a fork in the caller's control group, with its place among processes, where this process may do that.

        `difference` tells whether it did.
        """
        groups = content(f"/proc/{self._pid}/cgroup")
        path = next((line[3:] for line in groups.splitlines() if line.startswith("0::")), None)
        if path is not None and groups != content(f"/proc/{fork}/cgroup"):
            with suppress(OSError):
                _write(f"{_control_groups()}{path}/cgroup.procs", str(fork))
        with suppress(OSError):
            if (wanted := content(f"/proc/{self._pid}/oom_score_adj")) != content(f"/proc/{fork}/oom_score_adj"):
                _write(f"/proc/{fork}/oom_score_adj", wanted)
            os.setpriority(os.PRIO_PROCESS, fork, os.getpriority(os.PRIO_PROCESS, self._pid))
            os.sched_setscheduler(fork, os.sched_getscheduler(self._pid), os.sched_getparam(self._pid))

    def difference(self, fork: int) -> str | None:
        """What the kernel says of a fork that it does not say of the caller; None if they are the same."""
        try:
            theirs, own = _facts(self._pid), _facts(fork)
        except OSError:
            return "its process, or the fork, has ended"
        end = select.poll()  # select.select takes no number as high as this
        end.register(self._pidfd, select.POLLIN)
        if end.poll(0):
            return "its process has ended"
        for name, value in theirs.items():
            if own[name] != value and name not in self._allow - {SECCOMP}:
                return f"a fork would have another {name} than its caller"
        if theirs[SECCOMP] != _NO_FILTERS and SECCOMP not in self._allow:
            return "its process has seccomp filters: if the fork server has the same, give that --allow seccomp"
        # A program with more privileges than the one that connected may run in that process now.
        if {*own["user"].split()} != {str(self._user)} or {*own["group"].split()} != {str(self._group)}:
            return "its process is another user's than the one that connected"
        return None


def differing(files: Mapping[str, tuple[int, int, int]]) -> str | None:
    """A file that modules were loaded from and that is another one in this fork's mount namespace; None if none is."""
    for path, (_, size, modified) in files.items():
        try:
            status = os.stat(path)
        except OSError:
            return path
        if status.st_mtime_ns != modified or (status.st_size != size and not stat.S_ISDIR(status.st_mode)):
            return path
    return None


def _take_identity(identity: Mapping[str, str]) -> None:
    users, groups, more = ([int(word) for word in identity[name].split()] for name in ("Uid", "Gid", "Groups"))
    permitted, effective, inheritable, bounding, ambient = (
        int(identity[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")
    )
    if users[0] and permitted | effective | inheritable | ambient:
        raise OSError("a caller with capabilities must be root")
    if not users[0] and permitted != bounding and identity["NoNewPrivs"] == "0":
        raise OSError("a root without some capabilities must have no_new_privs, else its programs get them")
    for number in range(_MOST_CAPABILITIES):
        if not bounding >> number & 1 and _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
            _control(_PR_CAPBSET_DROP, number)
    if sorted(more) != sorted(os.getgroups()):
        os.setgroups(more)
    os.setresgid(*groups[:3])
    os.setresuid(*users[:3])
    _set_capabilities(effective, permitted, inheritable)
    _control(_PR_CAP_AMBIENT, _AMBIENT_CLEAR)
    for number in range(_MOST_CAPABILITIES):
        if ambient >> number & 1:
            _control(_PR_CAP_AMBIENT, _AMBIENT_RAISE, number)
    if identity["NoNewPrivs"] == "1":
        _control(_PR_SET_NO_NEW_PRIVS, 1)


def _renew_keyring() -> None:
    """Leave the server's session keyring."""
    if (number := _KEYCTL.get(os.uname().machine)) is not None:
        _libc.syscall(ctypes.c_long(number), ctypes.c_long(_KEYCTL_JOIN_SESSION_KEYRING), None)


def _set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    words = [mask >> shift & 0xFFFFFFFF for shift in (0, 32) for mask in (effective, permitted, inheritable)]
    header, data = struct.pack("Ii", _CAPABILITIES_VERSION, 0), struct.pack("6I", *words)
    if _libc.capset(header, data):
        _fail("capset")


def _set_namespaces(descriptor: int, flags: int) -> None:
    if _libc.setns(descriptor, flags):
        _fail("setns")


def _control(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *words):
        _fail(f"prctl {option}")


def _fail(name: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{name}: {os.strerror(number)}")


def _facts(pid: int) -> dict[str, str]:
    """What the kernel says of a process, by the names of ``--allow``."""
    fields = Status(str(pid)).fields
    return {
        "user": fields["Uid"],
        "group": fields["Gid"],
        "groups": " ".join(sorted(fields["Groups"].split())),
        "no_new_privs": fields.get("NoNewPrivs", ""),
        SECCOMP: f"{fields.get('Seccomp', '0')} {fields.get('Seccomp_filters', '0')}",
        "capabilities": " ".join(value for name, value in sorted(fields.items()) if name.startswith("Cap")),
        **{f"{name} namespace": _namespace(str(pid), name) for name in NAMESPACES},
        CGROUP: content(f"/proc/{pid}/cgroup"),
        LABEL: content(f"/proc/{pid}/attr/current"),
        "root directory": _place_of(str(pid), "root"),
        "oom_score_adj": content(f"/proc/{pid}/oom_score_adj"),
        "limits": content(f"/proc/{pid}/limits"),
        "priority": f"{os.getpriority(os.PRIO_PROCESS, pid)} {os.sched_getscheduler(pid)} "
        f"{os.sched_getparam(pid).sched_priority}",
    }


def _namespace(process: str, name: str) -> str:
    """A namespace of a process; nothing where the kernel does not have that kind."""
    try:
        return os.readlink(f"/proc/{process}/ns/{name}")
    except FileNotFoundError:
        return ""


def _place_of(process: str, name: str) -> str:
    """What a directory is that /proc names of a process."""
    descriptor = os.open(f"/proc/{process}/{name}", os.O_PATH | os.O_CLOEXEC)
    try:
        return _place(descriptor)
    finally:
        os.close(descriptor)


def _place(directory: int) -> str:
    """What tells an open directory from others: a directory may be the root of several mounts."""
    lines = content(f"/proc/self/fdinfo/{directory}").splitlines()
    mount = next((line for line in lines if line.startswith("mnt_id")), "")
    return f"{mount} {os.fstat(directory).st_ino}"


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _control_groups() -> str:
    """Where version 2 of the control groups is mounted."""
    with open("/proc/self/mounts") as mounts:
        return next((fields[1] for fields in map(str.split, mounts) if fields[2] == "cgroup2"), "/sys/fs/cgroup")
