"""The ``mountctl`` command and its subcommands."""

import click

from trimsfs import __version__
from trimsfs.command_group import CommandGroup, examples
from trimsfs.plugins import plugins

_SECTIONS = {
    "Mounts": {
        "up": "mountctl.commands.up",
        "down": "mountctl.commands.verbs",
        "status": "mountctl.commands.verbs",
        "logs": "mountctl.commands.verbs",
        "run": "mountctl.commands.foreground",
    },
    "Servers and keepers": {
        "restart": "mountctl.commands.verbs",
        "upgrade": "mountctl.commands.verbs",
        "recover": "mountctl.commands.verbs",
        "keeper": "mountctl.commands.foreground",
        "serve": "mountctl.commands.foreground",
        "abort": "mountctl.commands.verbs",
    },
    "Fleets": {},
    "Containers and Kubernetes": {
        "attach": "mountctl.commands.container_verbs",
        "detach": "mountctl.commands.container_verbs",
        "share": "mountctl.commands.container_verbs",
        "cdi": "mountctl.commands.container_verbs",
        "oci-hook": "mountctl.commands.container_verbs",
    },
}
"""The module of each subcommand, imported when the subcommand runs; extras add to them."""


@click.group(
    "mountctl",
    cls=CommandGroup,
    sections={
        title: verbs | plugins(f"commands/{title}", extras="mountctl.extras") for title, verbs in _SECTIONS.items()
    },
    epilog=examples("mountctl up", "mountctl status", "mountctl upgrade models"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def main() -> None:
    """Manage the trimsfs mounts of this host.

    NAME stands for the file /etc/trimsfs/mounts.d/NAME.toml, or is any mount point.
    """
