"""The message for each step of mounting in a container that can fail.

A message is one line: the subject, the cause and, if there is one, the remedy.
"""

import errno
import os

from mountctl.containers.forked_work import RefusalError
from trimsfs.errors import (
    ConfigurationError,
    MountpointError,
    NoSuchEntryError,
    NotMountedError,
    NotPermittedError,
    TrimsError,
)

_MESSAGES: dict[tuple[str, int | None], tuple[type[TrimsError], str]] = {
    ("path", errno.EXDEV): (ConfigurationError, "{source}: leads out of the mount: give a path in it"),
    ("path", errno.ELOOP): (
        ConfigurationError,
        "{source}: leads through a symbolic link: give the path that it leads to",
    ),
    ("path", errno.ENOENT): (NoSuchEntryError, "{source}: does not exist: see `trimsfs ls`"),
    ("not-trimsfs", None): (NotMountedError, "{source}: not on a trimsfs mount: `trimsfs status` lists the mounts"),
    ("control", None): (ConfigurationError, "{source}: containers get no control files: give a model"),
    ("process", errno.ENOENT): (NoSuchEntryError, "process {pid}: no such process"),
    ("process", errno.ESRCH): (NoSuchEntryError, "process {pid}: no such process"),
    ("own", None): (
        ConfigurationError,
        "process {pid} is in the mount namespace of the host: it sees every model already",
    ),
    ("occupied", None): (
        MountpointError,
        "{target}: a model is already mounted there: `mountctl detach` it first, or choose another target",
    ),
    ("nothing", None): (NotMountedError, "{target}: no trimsfs mount in the container"),
    ("forbidden", None): (MountpointError, "{target}: lies on a kernel file system: choose another target"),
    ("file-type", errno.EISDIR): (
        MountpointError,
        "{target}: is a directory, the model is a file: choose another target",
    ),
    ("file-type", errno.ENOTDIR): (
        MountpointError,
        "{target}: is a file, the model is a directory: choose another target",
    ),
    ("resolve", errno.ELOOP): (
        MountpointError,
        "{target}: leads through a symbolic link, which is not followed: choose another target",
    ),
    ("resolve", None): (MountpointError, "{target}: {cause} in the container: choose another target"),
    ("create", None): (
        MountpointError,
        "{target}: cannot be created in the container: {cause}: choose one that exists",
    ),
    ("mount", None): (MountpointError, "{target}: cannot mount there: {cause}"),
    ("unmount", None): (MountpointError, "{target}: cannot unmount it: {cause}"),
}
"""The messages, by step and errno value; None stands for all other values."""
_PRIVILEGED = {"clone", "process", "enter", "mount", "unmount"}


def error_for(refusal: RefusalError, source: str, target: str, pid: int) -> TrimsError:
    """The error for a failed step of mounting *source* at *target*."""
    step, number = refusal.step, refusal.number
    cause = os.strerror(number)
    if step in _PRIVILEGED and number in {errno.EPERM, errno.EACCES}:
        return NotPermittedError(f"{source or target}: {cause}: run this as root with the host's CAP_SYS_ADMIN")
    error, message = _MESSAGES.get(
        (step, number), _MESSAGES.get((step, None), (TrimsError, "{source}: {step}: {cause}"))
    )
    return error(message.format(source=source or target, target=target, pid=pid, step=step, cause=cause))
