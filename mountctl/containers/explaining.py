"""What a refusal means to whoever asked."""

import errno
import os

from mountctl.containers.children import RefusalError
from mountctl.containers.errors import (
    ArgumentError,
    ContainerError,
    NoSuchEntryError,
    NotMountedError,
    NotPermittedError,
    TargetError,
)

_MEANINGS: dict[tuple[str, int | None], tuple[type[ContainerError], str]] = {
    ("path", errno.EXDEV): (ArgumentError, "{source}: leads out of the mount"),
    ("path", errno.ELOOP): (ArgumentError, "{source}: leads through a symbolic link"),
    ("path", errno.ENOENT): (NoSuchEntryError, "{source}: {cause}"),
    ("not-trimsfs", None): (NotMountedError, "{source}: no trimsfs mount: `trimsfs status` lists them"),
    ("control", None): (ArgumentError, "{source}: control files are not given to containers: give a model"),
    ("process", errno.ENOENT): (NoSuchEntryError, "process {pid}: no such process"),
    ("process", errno.ESRCH): (NoSuchEntryError, "process {pid}: no such process"),
    ("own", None): (ArgumentError, "process {pid} has the mounts of this host: it sees every model already"),
    ("occupied", None): (
        TargetError,
        "{target}: a model is there already: `mountctl detach` it first, or choose another target",
    ),
    ("nothing", None): (NotMountedError, "{target}: no trimsfs mount in the container"),
    ("forbidden", None): (TargetError, "{target}: lies on a file system of the kernel: choose another target"),
    ("kind", errno.EISDIR): (TargetError, "{target}: is a directory, and the model is none: choose another target"),
    ("kind", errno.ENOTDIR): (TargetError, "{target}: is no directory, as the model is: choose another target"),
    ("resolve", errno.ELOOP): (
        TargetError,
        "{target}: leads through a link that is not followed: choose another target",
    ),
    ("resolve", None): (TargetError, "{target}: {cause} in the container: choose another target"),
    ("create", None): (TargetError, "{target}: cannot be made in the container: {cause}: choose one that exists"),
    ("mount", None): (TargetError, "{target}: cannot be mounted on: {cause}"),
    ("unmount", None): (TargetError, "{target}: cannot be unmounted: {cause}"),
}
"""By step and errno value, None for all others."""
_PRIVILEGED = {"clone", "process", "enter", "mount", "unmount"}


def explained(refusal: RefusalError, source: str, target: str, pid: int) -> ContainerError:
    """The error for a refusal of mounting *source* at *target*."""
    step, number = refusal.step, refusal.number
    cause = os.strerror(number)
    if step in _PRIVILEGED and number in {errno.EPERM, errno.EACCES}:
        return NotPermittedError(f"{source or target}: {cause}: this takes root with the host's CAP_SYS_ADMIN")
    kind, words = _MEANINGS.get(
        (step, number), _MEANINGS.get((step, None), (ContainerError, "{source}: {step}: {cause}"))
    )
    return kind(words.format(source=source or target, target=target, pid=pid, step=step, cause=cause))
