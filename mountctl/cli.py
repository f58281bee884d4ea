"""The ``mountctl`` command."""

import sys
from pathlib import Path

import click

from mountctl import mounting
from trimsfs.mountinfo import canonical


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Manage trimsfs mounts from outside: these commands never touch the mount itself."""


@main.command()
@click.argument("mountpoint", type=Path)  # not click.Path, which asks the file system about it
def abort(mountpoint: Path) -> None:
    """Abort the FUSE connection of MOUNTPOINT: every process that waits for it gets an error at once.

    The last resort for a server that no longer answers. Exit codes: 0 done, 1 not allowed, 10 no trimsfs mount there.
    """
    try:
        mounting.abort(canonical(mountpoint))
    except LookupError as error:
        click.echo(f"mountctl: {error.args[0]}", err=True)
        sys.exit(10)
    except OSError as error:
        click.echo(f"mountctl: {error.filename}: {error.strerror}", err=True)
        sys.exit(1)
