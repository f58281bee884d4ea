"""What a program takes over from the process that starts it, as far as a fork of another process can take it.

The rest makes the key of a fork server: a program is forked only from a process that equals its caller in that.
"""

import os
import resource
import stat
from _blake2 import blake2b  # hashlib would load OpenSSL, which takes longer than all the rest
from collections.abc import Iterable, Mapping
from contextlib import suppress

TYPE_CHECKING = False  # type checkers take it as true; `import typing` would take time
if TYPE_CHECKING:
    from typing import Any

    from trimsfs.extras.spawn.python_command import PythonCommand

NAMESPACES = {
    "user": 0x10000000,
    "mnt": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "time": 0x00000080,
    "cgroup": 0x02000000,
}
"""By the kernel's name, the flag of each kind of namespace."""
OF_SESSIONS = ("_", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES", "WINDOWID", "SSH_*", "XDG_SESSION_*", "INVOCATION_ID")
"""Variables that differ between calls and that no library reads when it is imported."""
_LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
_CONFINEMENT = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters")
_CONFINEMENT_OF_CAPABILITIES = "Cap"


class Status:
    """The fields of a process's /proc/PID/status, by name."""

    def __init__(self, process: str = "self", *, directory: "int | None" = None) -> None:
        """Of a process by its number, or by the open *directory* of it in /proc. Raises OSError."""
        path = f"/proc/{process}/status" if directory is None else "status"
        with open(
            path, errors="surrogateescape", opener=lambda name, flags: os.open(name, flags, dir_fd=directory)
        ) as file:
            pairs = (line.partition(":\t")[::2] for line in file.read().splitlines())
        self.fields = {name: value.strip() for name, value in pairs}

    def signals(self, field: str) -> list[int]:
        """The numbers of a set of signals, such as SigIgn."""
        mask = int(self.fields[field], 16)
        return [number for number in range(1, 65) if mask >> number - 1 & 1]

    def confinement(self) -> dict[str, str]:
        """Identity, privileges and filters."""
        return {
            name: value
            for name, value in self.fields.items()
            if name in _CONFINEMENT or name.startswith(_CONFINEMENT_OF_CAPABILITIES)
        }


def inherited_descriptors() -> list[int]:
    """The descriptors that a program started by this process would have."""
    numbers = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own descriptor
            if os.get_inheritable(int(name)):
                numbers.append(int(name))
    return sorted(numbers)


def facts(command: "PythonCommand", environment: Mapping[str, str], status: Status) -> "dict[str, Any]":
    """What a fork server tells its child to become, as JSON; descriptors go beside it."""
    return {
        "interpreter": [command.path, *command.options],
        "kind": command.kind,
        "target": command.target,
        "arguments": command.arguments,
        "line": command.line,
        "environment": dict(environment),
        "umask": int(status.fields["Umask"], 8),
        "limits": [[limit, *resource.getrlimit(limit)] for limit in _LIMITS],
        "affinity": sorted(os.sched_getaffinity(0)),
        "ignored": status.signals("SigIgn"),
        "blocked": status.signals("SigBlk"),
    }


def common(environment: Mapping[str, str], vary: Iterable[str]) -> dict[str, str]:
    """The variables that a fork server shares with its callers: none of a session, and none that match *vary*."""
    left_out = [*OF_SESSIONS, *vary]
    return {
        name: value for name, value in environment.items() if not any(matches(name, pattern) for pattern in left_out)
    }


def key(command: "PythonCommand", environment: Mapping[str, str], status: Status, imports: object) -> str:
    """The name of the fork server for a program: 32 hexadecimal digits.

    *environment* is what it shares with its callers, and *imports* says what it imports. Raises OSError.
    """
    interpreter = os.stat(command.path)
    root = os.stat("/")
    same = [
        os.path.realpath(command.path),
        command.path,
        _identity(interpreter),
        command.options,
        sorted(environment.items()),
        sorted(status.confinement().items()),
        [os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES],
        content("/proc/self/cgroup"),
        content("/proc/self/attr/current"),
        content("/proc/self/oom_score_adj"),
        [root.st_dev, root.st_ino],
        [resource.getrlimit(limit)[1] for limit in _LIMITS],
        [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), os.sched_getparam(0).sched_priority],
        imports,
    ]
    return blake2b(repr(same).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def script_of(command: "PythonCommand") -> str:
    """What tells one program from another: a script's path, a module's name, or the code itself."""
    return os.path.realpath(command.target) if command.kind == "script" else f"-{command.kind} {command.target}"


def directory_of(command: "PythonCommand") -> str:
    """The directory of which a script imports modules first."""
    return os.path.dirname(os.path.realpath(command.target)) if command.kind == "script" else os.getcwd()


def matches(name: str, pattern: str) -> bool:
    """Whether a variable has this name, or begins as a pattern that ends with ``*`` does."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, stat.S_IFMT(status.st_mode)]


def content(path: str) -> str:
    """What the kernel says, or nothing where it does not have that."""
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
