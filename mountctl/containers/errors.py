"""The errors of the commands for containers, with the exit code of each.

A message is one line: the subject, the cause and, where there is one, the remedy.
"""


class ContainerError(Exception):
    """Base of these errors; by itself, an unexpected one."""

    exit_code = 1


class ArgumentError(ContainerError):
    """An argument that cannot be used."""

    exit_code = 2


class TargetError(ContainerError):
    """The target in the container cannot be mounted on, or unmounted."""

    exit_code = 4


class NotMountedError(ContainerError):
    """There is no trimsfs mount."""

    exit_code = 10


class NotPermittedError(ContainerError):
    """The caller may not do this."""

    exit_code = 11


class NoSuchEntryError(ContainerError):
    """A path, process or container that does not exist."""

    exit_code = 13


class EngineError(ContainerError):
    """No container engine is installed, or it failed."""

    exit_code = 15


class NoAnswerError(ContainerError):
    """A mount, or a container's file system, that does not answer in time."""

    exit_code = 16


ERRORS = (
    ContainerError,
    ArgumentError,
    TargetError,
    NotMountedError,
    NotPermittedError,
    NoSuchEntryError,
    EngineError,
    NoAnswerError,
)
