"""Prints lines, and ends commands that fail with one line and a documented exit code."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, ParamSpec, TypeVar

import click
from rich.cells import cell_len

from trimsfs import errors
from trimsfs.exit_codes import exit_code
from trimsfs.mountinfo import Mount
from trimsfs.text import printable

P = ParamSpec("P")
T = TypeVar("T")


def say(line: str, *, error: bool = False) -> None:
    """Print text as one line, with control characters escaped."""
    click.echo(printable(line), err=error)


def show(rows: Sequence[Sequence[str]], *, left: int, last: bool = False) -> None:
    """Print a table; the first row has the headings.

    The first *left* columns, those without a heading and, if *last*, the last one are aligned to the left.
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - cell_len(cell))
            to_left = place < left or not rows[0][place] or (last and place == len(row) - 1)
            cells.append(cell + space if to_left else space + cell)
        lines.append("  ".join(cells).rstrip())
    click.echo("\n".join(lines))


def share(part: int, whole: int) -> str:
    """A part as a percentage of at most 100, or -."""
    return f"{min(part / whole, 1):.0%}" if part and whole else "-"


def fail(kind: str, message: str) -> NoReturn:
    """Print one line and exit with the code of an error class."""
    say(f"trimsfs: {message}", error=True)
    sys.exit(exit_code(kind))


def fail_if_any(failures: Sequence[tuple[str, str]]) -> None:
    """Print the message of each failure, a pair of error class and message, and exit with the code of the first."""
    for _, message in failures:
        say(f"trimsfs: {message}", error=True)
    if failures:
        sys.exit(exit_code(failures[0][0]))


def left_out(
    answers: Iterable[tuple[Mount, T | errors.TrimsError]], failures: list[tuple[str, str]]
) -> Iterator[tuple[Mount, T]]:
    """The mounts that answered, and their answers; adds the others to *failures*.

    Another user's mount that denies access is reported, but is no failure.
    """
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
