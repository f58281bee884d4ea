"""The ``mountctl`` command and its subcommands."""

import importlib

import click

from trimsfs import __version__

_HOMES = {
    "up": "mountctl.commands.verbs",
    "down": "mountctl.commands.verbs",
    "restart": "mountctl.commands.verbs",
    "upgrade": "mountctl.commands.verbs",
    "status": "mountctl.commands.verbs",
    "logs": "mountctl.commands.verbs",
    "recover": "mountctl.commands.verbs",
    "abort": "mountctl.commands.verbs",
    "run": "mountctl.commands.verbs",
    "csi": "mountctl.csi.command",
    "attach": "mountctl.containers.commands",
    "detach": "mountctl.containers.commands",
    "cdi": "mountctl.containers.commands",
    "oci-hook": "mountctl.containers.commands",
    "share": "mountctl.containers.commands",
}
"""The module of each subcommand, imported when the subcommand runs."""


class _Commands(click.Group):
    """Lists the subcommands in the order in which operators need them."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(_HOMES)

    def get_command(self, _context: click.Context, name: str) -> click.Command | None:
        if name not in _HOMES:
            return None
        command: click.Command = getattr(importlib.import_module(_HOMES[name]), name.replace("-", "_"))
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Manage the trimsfs mounts of this host.

    NAME is that of a file in /etc/trimsfs/mounts.d, NAME.toml, or any mount point.
    """
