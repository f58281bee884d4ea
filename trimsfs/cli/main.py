"""The ``trimsfs`` command and its subcommands."""

import click

from trimsfs import __version__
from trimsfs.command_group import CommandGroup

_HOMES = {
    "mount": "trimsfs.cli.mount",
    "umount": "trimsfs.cli.umount",
    "ls": "trimsfs.cli.ls",
    "status": "trimsfs.cli.status",
    "warm": "trimsfs.cli.cache_commands",
    "pin": "trimsfs.cli.cache_commands",
    "unpin": "trimsfs.cli.cache_commands",
    "evict": "trimsfs.cli.cache_commands",
    "verify": "trimsfs.cli.cache_commands",
    "jobs": "trimsfs.cli.jobs",
    "refresh": "trimsfs.cli.refresh",
    "run": "trimsfs.cli.run",
    "doctor": "trimsfs.cli.doctor",
}
"""The module of each subcommand, in the order of the help.

Each is imported on use: an import would delay every program that `trimsfs run` starts.
"""


@click.group(
    "trimsfs",
    cls=CommandGroup,
    homes=_HOMES,
    synonyms={"unmount": "umount"},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def main() -> None:
    """Models of an S3 bucket or a directory as ordinary files: one copy on this host, shared by every process."""
