"""The one table from errors to exit codes, and how an error is shown."""

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import click

from trimsfs import errors

P = ParamSpec("P")

UNEXPECTED = 1
EXIT_CODES: dict[str, int] = {
    errors.ConfigurationError.__name__: 2,
    errors.FuseUnavailableError.__name__: 3,
    errors.MountpointError.__name__: 4,
    errors.BucketNotFoundError.__name__: 5,
    errors.StoreAccessError.__name__: 6,
    errors.StoreUnavailableError.__name__: 7,
    errors.CacheInUseError.__name__: 8,
    errors.CacheUnusableError.__name__: 9,
    errors.CacheFullError.__name__: 9,
    errors.NotMountedError.__name__: 10,
    errors.NotPermittedError.__name__: 11,
    errors.InUseError.__name__: 12,
    errors.NoSuchEntryError.__name__: 13,
    errors.ObjectChangedError.__name__: 14,
}
"""By the name of the error's class, which is also how servers and control files name it."""


def fail(kind: str, message: str) -> NoReturn:
    """Print one line and exit with the code of an error class."""
    click.echo(f"trimsfs: {message}", err=True)
    sys.exit(EXIT_CODES.get(kind, UNEXPECTED))


def reported(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose TrimsErrors end it with one line and their exit code."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> None:
        try:
            function(*arguments, **named)
        except errors.TrimsError as error:
            fail(type(error).__name__, str(error))

    return call
