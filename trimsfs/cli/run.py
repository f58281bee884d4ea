"""``trimsfs run``: runs a program whose MXNet maps models from mounts."""

import os
from pathlib import Path

import click

import trimsfs.client
from trimsfs.cli.output import reported
from trimsfs.client.import_hook import VERBOSE
from trimsfs.command_group import examples
from trimsfs.errors import CommandNotFoundError, CommandNotRunnableError

STARTUP = Path(trimsfs.client.__file__).with_name("startup")


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples("trimsfs run -- python app.py", "trimsfs run --verbose -- python app.py"),
)
@click.option("-v", "--verbose", is_flag=True, help="Log for each model whether it is mapped and, if not, why.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@reported
def run(command: tuple[str, ...], *, verbose: bool) -> None:
    """Run a program whose MXNet maps models.

    MXNet's own loaders then map files that lie on a mount instead of reading them; nothing else changes. This includes
    all Python programs that COMMAND starts, unless they ignore PYTHONPATH, as `python -E` and `python -I` do.
    """
    places = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    if verbose:
        environment[VERBOSE] = "1"
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        raise CommandNotFoundError(f"{command[0]}: no such command") from None
    except OSError as error:
        raise CommandNotRunnableError(f"{command[0]}: {error.strerror}") from error
