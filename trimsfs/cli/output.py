"""Prints lines, and ends commands that fail with one line and a documented exit code."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

import click

from trimsfs import errors
from trimsfs.exit_codes import exit_code
from trimsfs.mountinfo import Mount
from trimsfs.text import printable

if TYPE_CHECKING:
    from rich.table import Table

P = ParamSpec("P")
T = TypeVar("T")

PIPE_WIDTH = 1000


def say(line: str, *, error: bool = False) -> None:
    """Print text as one line, whatever names it contains."""
    click.echo(printable(line), err=error)


def show(table: "Table") -> None:
    """Print a table; in a pipe it is not folded to a terminal's width."""
    from rich.console import Console  # noqa: PLC0415 - most commands show none, and importing takes long

    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def fail(kind: str, message: str) -> NoReturn:
    """Print one line and exit with the code of an error class."""
    say(f"trimsfs: {message}", error=True)
    sys.exit(exit_code(kind))


def fail_if_any(failures: Sequence[tuple[str, str]]) -> None:
    """Print a line for each failure, of an error class and with a message, and exit with the code of the first."""
    for _, message in failures:
        say(f"trimsfs: {message}", error=True)
    if failures:
        sys.exit(exit_code(failures[0][0]))


def left_out(
    answers: Iterable[tuple[Mount, T | errors.TrimsError]], failures: list[tuple[str, str]]
) -> Iterator[tuple[Mount, T]]:
    """The answers of those mounts that have given one; *failures* get the others, and why. That another user's mount
    lets nobody else in is told, and is no failure."""
    for mount, answer in answers:
        if not isinstance(answer, errors.TrimsError):
            yield mount, answer
        elif isinstance(answer, errors.NotPermittedError):
            say(f"trimsfs: left out: {answer}", error=True)
        else:
            failures.append((type(answer).__name__, f"left out: {answer}"))


def reported(function: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command: a TrimsError, or Ctrl-C, ends it with one line and a documented exit code."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> None:
        try:
            function(*arguments, **named)
        except errors.TrimsError as error:
            fail(type(error).__name__, str(error))
        except KeyboardInterrupt:
            fail(KeyboardInterrupt.__name__, "interrupted")

    return call
