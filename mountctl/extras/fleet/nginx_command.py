"""The subcommand for fleets: nginx's configuration, draining and serving again."""

import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import click

from mountctl.commands.declared_mounts import NamedMount, complete_mount, declared_mounts, find_mount
from mountctl.commands.outcome import reported
from mountctl.commands.verbs import mounts_directory
from mountctl.extras.fleet.nginx import Member, Nginx
from trimsfs.command_group import examples
from trimsfs.errors import ConfigurationError
from trimsfs.exit_codes import exit_code
from trimsfs.options import FLEET_DIRECTORY, MountOptions, load_options

Action = Literal["apply", "drain", "undrain", "run"]


@click.command(epilog=examples("mountctl fleet apply", "mountctl fleet drain models", "mountctl fleet undrain models"))
@click.argument("action", type=click.Choice(["apply", "drain", "undrain", "run"]))
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete_mount)
@click.option(
    "--fleet-dir",
    type=click.Path(path_type=Path),
    envvar="TRIMSFS_FLEET_DIR",
    default=FLEET_DIRECTORY,
    show_default=True,
    help="Directory of nginx's files.",
)
@mounts_directory
@reported
def fleet(action: Action, names: tuple[str, ...], fleet_dir: Path, directory: Path) -> int:
    """Configure the nginx that sends this host's chunks to its fleet.

    apply: write its configuration for all declared mounts with a fleet, check it, and wait until nginx has loaded it.
    If no such mount is left, nginx stops listening. drain: stop sending chunks of NAME, or of all mounts, until
    undrain; what is under way is finished. run: apply, then run nginx in the foreground, for a service manager or a
    container.
    """
    nginx = Nginx(fleet_dir.absolute())
    chosen = [find_mount(name, directory).mountpoint for name in names]
    mounts, problems = declared_mounts(directory)
    with nginx.changing():
        options, left_out = _options_of_fleets(mounts, problems)
        for problem in problems:
            click.echo(f"mountctl: {problem}", err=True)
        members = _members(options, nginx)
        for mountpoint in chosen:
            if mountpoint in left_out:
                raise ConfigurationError(f"{mountpoint} is left out: correct its options first")
            if mountpoint not in options:
                raise ConfigurationError(f"{mountpoint} belongs to no fleet: set fleet in its file in {directory}")
        if action in {"drain", "undrain"}:
            nginx.set_drained(chosen or [*options, *left_out], drained=action == "drain")
            members = _members(options, nginx)
        if not members and problems:
            raise ConfigurationError(f"no mount declared in {directory} can be served to a fleet: correct the above")
        if not members and (action == "run" or nginx.running() is None):
            raise ConfigurationError(f"no mount declared in {directory} belongs to a fleet: set fleet in one")
        if action == "run":
            nginx.check_stopped()
        nginx.write(members)
        if action == "run":
            nginx.check_ports(members)
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            command = nginx.command()
            os.execv(command[0], command)
        message = "reloaded nginx"
        if not nginx.reload():
            nginx.check_ports(members, available=False)
            message = "nginx does not run: `systemctl start trimsfs-nginx`"
    for member in members:
        state = "drained" if member.drained else f"served at {member.options.fleet_listen}"
        click.echo(f"{member.mountpoint}: fleet {member.options.fleet}: {state}")
    if not members:
        message += ", which serves nothing, as no mount belongs to a fleet: `systemctl disable --now trimsfs-nginx`"
    click.echo(message)
    return exit_code(ConfigurationError.__name__) if problems else 0


def _options_of_fleets(
    mounts: Sequence[NamedMount], problems: list[ConfigurationError]
) -> tuple[dict[Path, MountOptions], list[Path]]:
    """The options of the declared mounts that belong to a fleet, by mount point, and the mounts that are left out.

    Adds to *problems* what is wrong with the options of those.
    """
    included, left_out = {}, []
    for mount in mounts:
        try:
            options = load_options({}, configs=mount.configs).resolved(mount.mountpoint)
        except ConfigurationError as error:
            problems.append(ConfigurationError(f"{mount.mountpoint} is left out: {error}"))
            left_out.append(mount.mountpoint)
        else:
            if options.fleet is not None:
                included[mount.mountpoint] = options
    return included, left_out


def _members(options: Mapping[Path, MountOptions], nginx: Nginx) -> list[Member]:
    drained = nginx.drained()
    return [
        Member(mountpoint=mountpoint, options=of_mount, drained=str(mountpoint) in drained)
        for mountpoint, of_mount in options.items()
    ]
