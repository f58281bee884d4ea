"""``trimsfs run``: runs a program whose MXNet maps models from mounts."""

from collections.abc import Mapping, Sequence

import click

from trimsfs.cli.direct_run import environment, run_plain
from trimsfs.cli.output import reported
from trimsfs.command_group import examples
from trimsfs.errors import CommandNotFoundError, CommandNotRunnableError


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples("trimsfs run -- python app.py", "trimsfs run --verbose -- python app.py"),
)
@click.option("-v", "--verbose", is_flag=True, help="Log for each model whether it is mapped and, if not, why.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], *, verbose: bool) -> None:
    """Run a program whose MXNet maps models.

    MXNet's own loaders then map files that lie on a mount instead of reading them; nothing else changes. This includes
    all Python programs that COMMAND starts, unless they ignore PYTHONPATH, as `python -E` and `python -I` do.
    """
    become(command, environment(verbose=verbose))


@reported
def become(command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Become a program. One that cannot be executed ends this process with a line, and 126 or 127."""
    try:
        run_plain(command, variables)
    except FileNotFoundError:
        raise CommandNotFoundError(f"{command[0]}: no such command") from None
    except OSError as error:
        raise CommandNotRunnableError(f"{command[0]}: {error.strerror}") from error
