"""Prints lines, and ends commands that fail with one line and a documented exit code."""

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import click

from trimsfs import errors
from trimsfs.exit_codes import exit_code
from trimsfs.text import printable

P = ParamSpec("P")


def say(line: str, *, error: bool = False) -> None:
    """Print text as one line, whatever names it contains."""
    click.echo(printable(line), err=error)


def fail(kind: str, message: str) -> NoReturn:
    """Print one line and exit with the code of an error class."""
    say(f"trimsfs: {message}", error=True)
    sys.exit(exit_code(kind))


def reported(function: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command: a TrimsError ends it with one line and the exit code of its class."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> None:
        try:
            function(*arguments, **named)
        except errors.TrimsError as error:
            fail(type(error).__name__, str(error))

    return call
