"""``trimsfs refresh``: makes new uploads and deletions visible at once."""

import json
from pathlib import Path

import click

from trimsfs.cli.control_client import control_directory, read_json
from trimsfs.cli.output import reported, say
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import NoSuchEntryError


@click.command(epilog=examples("trimsfs refresh /models/resnet50"))
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=Path, shell_complete=complete_mounted)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def refresh(paths: tuple[Path, ...], as_json: bool) -> None:
    """Make new uploads and deletions visible.

    The server asks the store about PATH, and everything below it, at the next use.

    If PATH is unknown, the server asks about the nearest known directory above it. What is cached stays cached. While
    the store does not answer, its last answer counts.
    """
    done = [read_json(_known(path) / "refresh") | {"path": str(path)} for path in paths]
    if as_json:
        click.echo(json.dumps(done, indent=2))
        return
    for path in paths:
        say(f"{path}: the server asks the store at the next use")


def _known(path: Path) -> Path:
    """The control directory of a path, or of the nearest known directory above it."""
    try:
        return control_directory(path)
    except NoSuchEntryError:
        return _known(path.absolute().parent)
