"""The errors of the commands for containers, with the exit code of each.

A message is one line: the subject, the cause and, if there is one, the remedy.
"""


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
