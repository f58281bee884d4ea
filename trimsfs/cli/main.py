"""The ``trimsfs`` command and its subcommands."""

import click

from trimsfs import __version__
from trimsfs.command_group import CommandGroup, examples
from trimsfs.plugins import plugins

_SECTIONS = {
    "Mounts": {
        "mount": "trimsfs.cli.mount",
        "serve": "trimsfs.cli.serve",
        "umount": "trimsfs.cli.umount",
        "status": "trimsfs.cli.watch.status",
        "doctor": "trimsfs.cli.diagnosis.doctor",
    },
    "Models": {
        "ls": "trimsfs.cli.ls",
        "warm": "trimsfs.cli.cache_commands",
        "pin": "trimsfs.cli.cache_commands",
        "unpin": "trimsfs.cli.cache_commands",
        "evict": "trimsfs.cli.cache_commands",
        "verify": "trimsfs.cli.cache_commands",
        "refresh": "trimsfs.cli.refresh",
    },
    "Versions": {},
    "Watch": {
        "top": "trimsfs.cli.watch.top",
        "jobs": "trimsfs.cli.watch.jobs",
    },
    "Run": {
        "run": "trimsfs.cli.run",
    },
}
"""The module of each subcommand of the core, by title of the help; extras add to them.

Each is imported on use: an import would delay every program that `trimsfs run` starts.
"""


@click.group(
    "trimsfs",
    cls=CommandGroup,
    sections={title: verbs | plugins(f"commands/{title}") for title, verbs in _SECTIONS.items()},
    synonyms={"unmount": "umount"},
    epilog=examples("trimsfs mount s3://my-models /models", "trimsfs ls", "trimsfs warm --help"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def main() -> None:
    """Models of an S3 bucket or a directory as ordinary files: one copy on this host, shared by every process."""
