"""How a subcommand ends: its error as one line, and its exit code."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import click

from mountctl.keeper.control_socket import KeeperGoneError, KeeperRefusesError
from trimsfs.errors import NotMountedError, NotPermittedError, TrimsError
from trimsfs.exit_codes import exit_code
from trimsfs.text import printable

P = ParamSpec("P")


def reported(function: Callable[P, int | None]) -> Callable[P, None]:
    """Decorate a command that returns its exit code: an error ends it with one line and a documented exit code."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> None:
        try:
            code = function(*arguments, **named)
        except (TrimsError, KeeperGoneError) as error:
            click.echo(f"mountctl: {printable(str(error))}", err=True)
            code = code_of(error)
        except PermissionError as error:
            click.echo(f"mountctl: {error.filename}: {error.strerror}: run it as root", err=True)
            code = exit_code(NotPermittedError.__name__)
        except OSError as error:
            click.echo(f"mountctl: {error.filename}: {error.strerror}", err=True)
            code = 1
        sys.exit(code or 0)

    return call


def code_of(error: TrimsError | KeeperGoneError) -> int:
    if isinstance(error, TrimsError):
        return exit_code(type(error).__name__)
    kind = NotPermittedError if isinstance(error, KeeperRefusesError) else NotMountedError
    return exit_code(kind.__name__)
