"""``trimsfs serve``: runs the servers of a mount whose keeper is elsewhere, as in another container."""

import sys
from pathlib import Path
from typing import NoReturn

import click

from trimsfs.cli.mount import (
    SourceFirst,
    become,
    check_apart,
    check_meaning,
    export,
    make_default_store,
    warn_of_full_disk,
)
from trimsfs.cli.mount_options import mount_options
from trimsfs.cli.output import reported
from trimsfs.command_group import complete_path, examples
from trimsfs.mountinfo import canonical
from trimsfs.options import MountOptions, keeper_order


@click.command(
    cls=SourceFirst,
    epilog=examples(
        "trimsfs serve s3://my-models /models",
        "trimsfs serve /var/lib/trimsfs/mounts/models --config /etc/trimsfs/config.toml",
    ),
)
@click.argument("source", metavar="[STORE]", required=False)
@click.argument("mountpoint", type=Path, shell_complete=complete_path, metavar="MOUNTPOINT", required=False)
@reported
@mount_options
def serve(mountpoint: Path, options: MountOptions) -> None:
    """Serve a store at MOUNTPOINT, which a keeper elsewhere holds.

    Joins the keeper that `mountctl keeper MOUNTPOINT` runs, by its socket in /run/trimsfs, and stays in the foreground.
    If another one serves already, this one takes over. Once it ends, readers wait for the next one. Takes the options
    of `trimsfs mount`.
    """
    serve_store(mountpoint, options)


def serve_store(mountpoint: Path, options: MountOptions) -> NoReturn:
    """Join the keeper of a mount point, and never return. Raises TrimsError, or exits."""
    for _, own in options.each_store():
        check_meaning(mountpoint, own.store)
    mountpoint = canonical(mountpoint)
    options = options.resolved(mountpoint)
    check_apart(mountpoint, options)
    make_default_store(options)
    warn_of_full_disk(options)
    export(options, log_to=sys.stderr)  # its root file system may be read-only
    order = keeper_order(mountpoint, options, foreground=True)
    become([sys.executable, "-m", "mountctl.keeper", "--launch"], order)
