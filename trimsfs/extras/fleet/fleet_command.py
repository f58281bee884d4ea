"""``trimsfs fleet``: turns a mount's part in its fleet off and on."""

import json
from pathlib import Path

import click

from trimsfs.cli.control_client import mount_of_path, read_json
from trimsfs.cli.output import reported, say
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import ConfigurationError, NoSuchEntryError


@click.command(epilog=examples("trimsfs fleet off /models", "trimsfs fleet on /models"))
@click.argument("state", type=click.Choice(["on", "off"]))
@click.argument("path", type=Path, shell_complete=complete_mounted)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def fleet(state: str, path: Path, as_json: bool) -> None:
    """Turn the fleet of a mount off or on.

    The mount that PATH lies on asks other hosts for chunks and answers them, or fetches alone from the store. This
    lasts until the mount ends. `trimsfs status` shows it.
    """
    mountpoint = mount_of_path(path).mountpoint
    try:
        done = read_json(mountpoint / ".trims" / f"fleet-{state}")
    except NoSuchEntryError:
        raise ConfigurationError(
            f"{mountpoint} belongs to no fleet now: see `trimsfs status` and the option fleet"
        ) from None
    if as_json:
        click.echo(json.dumps(done | {"mountpoint": str(mountpoint)}))
    else:
        say(f"{mountpoint}: fleet {state}")
