"""The ``trimsfs`` command and its subcommands."""

import click

from trimsfs import __version__
from trimsfs.command_group import CommandGroup, examples

_SECTIONS = {
    "Mounts": {
        "mount": "trimsfs.cli.mount",
        "serve": "trimsfs.cli.serve",
        "umount": "trimsfs.cli.umount",
        "status": "trimsfs.cli.status",
        "doctor": "trimsfs.cli.doctor",
        "fleet": "trimsfs.cli.fleet",
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
    "Versions": {
        "push": "trimsfs.cli.push",
        "import": "trimsfs.cli.push",
        "versions": "trimsfs.cli.versions",
        "alias": "trimsfs.cli.versions",
        "rollback": "trimsfs.cli.versions",
        "rm": "trimsfs.cli.versions",
        "diff": "trimsfs.cli.diff",
    },
    "Watch": {
        "top": "trimsfs.cli.top",
        "jobs": "trimsfs.cli.jobs",
        "trace": "trimsfs.cli.trace",
        "exporter": "trimsfs.cli.exporter",
        "node-labels": "trimsfs.cli.node_labels",
    },
    "Run": {
        "run": "trimsfs.cli.run",
    },
}
"""The module of each subcommand, by title of the help.

Each is imported on use: an import would delay every program that `trimsfs run` starts.
"""


@click.group(
    "trimsfs",
    cls=CommandGroup,
    sections=_SECTIONS,
    synonyms={"unmount": "umount"},
    epilog=examples("trimsfs mount s3://my-models /models", "trimsfs ls", "trimsfs warm --help"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def main() -> None:
    """Models of an S3 bucket or a directory as ordinary files: one copy on this host, shared by every process."""
