"""The ``trimsfs`` command and its subcommands."""

import importlib

import click

from trimsfs import __version__

_HOMES = {
    "mount": "mount",
    "umount": "umount",
    "unmount": "umount",
    "ls": "ls",
    "status": "status",
    "warm": "cache_commands",
    "pin": "cache_commands",
    "unpin": "cache_commands",
    "evict": "cache_commands",
    "verify": "cache_commands",
    "run": "run",
    "doctor": "doctor",
}
"""The module of each subcommand, imported on use: `trimsfs run` delays the start of every program."""
_OTHER_NAMES = {"unmount": "umount"}
"""Names of subcommands that are taken as well."""


class _Commands(click.Group):
    """The subcommands, listed in the order of first use."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return [name for name in _HOMES if name not in _OTHER_NAMES]

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _HOMES:
            return None
        module = importlib.import_module(f"trimsfs.cli.{_HOMES[name]}")
        command: click.Command = getattr(module, _OTHER_NAMES.get(name, name))
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Models of an S3 bucket or a directory as ordinary files: one copy on this host, shared by every process."""
