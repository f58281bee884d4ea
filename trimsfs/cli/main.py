"""The ``trimsfs`` command and its subcommands."""

import click

from trimsfs import __version__
from trimsfs.cli.commands import evict, pin, unpin, warm
from trimsfs.cli.doctor import doctor
from trimsfs.cli.inspect import ls, status
from trimsfs.cli.mount import mount, umount
from trimsfs.cli.run import run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Models of an S3 bucket or a directory as ordinary files: one copy on this host, shared by every process."""


for _command in (mount, umount, ls, status, warm, pin, unpin, evict, run, doctor):
    main.add_command(_command)
