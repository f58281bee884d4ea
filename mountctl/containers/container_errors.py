"""The errors of the commands for containers, with the exit code of each, and the message for each step that can fail.

A message is one line: the subject, the cause and, if there is one, the remedy.
"""

import errno
import os

from mountctl.containers.forked_work import RefusalError


class ContainerError(Exception):
    """Base of these errors; raised itself for an unexpected error."""

    exit_code = 1


class ArgumentError(ContainerError):
    """The command cannot use an argument."""

    exit_code = 2


class TargetError(ContainerError):
    """The command cannot mount on the target in the container, or cannot unmount it."""

    exit_code = 4


class NotMountedError(ContainerError):
    """There is no trimsfs mount."""

    exit_code = 10


class NotPermittedError(ContainerError):
    """The caller may not do this."""

    exit_code = 11


class NoSuchEntryError(ContainerError):
    """A path, process or container does not exist."""

    exit_code = 13


class EngineError(ContainerError):
    """No container engine is installed, or it failed."""

    exit_code = 15


class NoAnswerError(ContainerError):
    """A mount, or a container's file system, does not answer in time."""

    exit_code = 16


_MESSAGES: dict[tuple[str, int | None], tuple[type[ContainerError], str]] = {
    ("path", errno.EXDEV): (ArgumentError, "{source}: leads out of the mount: give a path in it"),
    ("path", errno.ELOOP): (ArgumentError, "{source}: leads through a symbolic link: give the path that it leads to"),
    ("path", errno.ENOENT): (NoSuchEntryError, "{source}: does not exist: see `trimsfs ls`"),
    ("not-trimsfs", None): (NotMountedError, "{source}: not on a trimsfs mount: `trimsfs status` lists the mounts"),
    ("control", None): (ArgumentError, "{source}: containers get no control files: give a model"),
    ("process", errno.ENOENT): (NoSuchEntryError, "process {pid}: no such process"),
    ("process", errno.ESRCH): (NoSuchEntryError, "process {pid}: no such process"),
    ("own", None): (ArgumentError, "process {pid} is in the mount namespace of the host: it sees every model already"),
    ("occupied", None): (
        TargetError,
        "{target}: a model is already mounted there: `mountctl detach` it first, or choose another target",
    ),
    ("nothing", None): (NotMountedError, "{target}: no trimsfs mount in the container"),
    ("forbidden", None): (TargetError, "{target}: lies on a kernel file system: choose another target"),
    ("file-type", errno.EISDIR): (TargetError, "{target}: is a directory, the model is a file: choose another target"),
    ("file-type", errno.ENOTDIR): (TargetError, "{target}: is a file, the model is a directory: choose another target"),
    ("resolve", errno.ELOOP): (
        TargetError,
        "{target}: leads through a symbolic link, which is not followed: choose another target",
    ),
    ("resolve", None): (TargetError, "{target}: {cause} in the container: choose another target"),
    ("create", None): (TargetError, "{target}: cannot be created in the container: {cause}: choose one that exists"),
    ("mount", None): (TargetError, "{target}: cannot mount there: {cause}"),
    ("unmount", None): (TargetError, "{target}: cannot unmount it: {cause}"),
}
"""The messages, by step and errno value; None stands for all other values."""
_PRIVILEGED = {"clone", "process", "enter", "mount", "unmount"}


def error_for(refusal: RefusalError, source: str, target: str, pid: int) -> ContainerError:
    """The error for a failed step of mounting *source* at *target*."""
    step, number = refusal.step, refusal.number
    cause = os.strerror(number)
    if step in _PRIVILEGED and number in {errno.EPERM, errno.EACCES}:
        return NotPermittedError(f"{source or target}: {cause}: run this as root with the host's CAP_SYS_ADMIN")
    error, message = _MESSAGES.get(
        (step, number), _MESSAGES.get((step, None), (ContainerError, "{source}: {step}: {cause}"))
    )
    return error(message.format(source=source or target, target=target, pid=pid, step=step, cause=cause))
