"""The subcommand up: mounts what is declared."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mountctl.commands.declared_mounts import DIRECTORY, NamedMount
from mountctl.commands.mount_status import (
    ANSWER_TIMEOUT_S,
    DEAD,
    DEGRADED,
    NOT_KEPT,
    PROBE_S,
    changed_options,
    environment_of,
    status_of,
    without_store,
)
from mountctl.commands.outcome import code_of, reported
from mountctl.commands.verbs import chosen_mounts, mounts_directory, names_argument, unit_serves
from mountctl.keeper.control_socket import KeeperGoneError, ask
from mountctl.linux import mounting, systemd
from trimsfs.command_group import examples
from trimsfs.errors import (
    CacheInUseError,
    MountpointError,
    NotMountedError,
    StoreUnavailableError,
    TrimsError,
)
from trimsfs.exit_codes import exit_code
from trimsfs.mountinfo import Mount, trimsfs_at
from trimsfs.processes import device_served_by, shown, usage
from trimsfs.text import printable

DETACHED_S, DETACHED_INTERVAL_S = 2.0, 0.1
"""How long `up` waits for the unit of a detached mount to end, and how often it looks."""
STORE_AWAY = exit_code(StoreUnavailableError.__name__)
_LACKING = {NOT_KEPT: DEGRADED} | dict.fromkeys(("hanging", "starting"), exit_code(NotMountedError.__name__))
"""The exit codes for states in which a mount is there and not well."""
STORE_WAIT_S, STORE_INTERVAL_S = 300.0, 1.0
"""How long `up --wait-for-store` waits, and how long it pauses between attempts."""


class _WaitsForStore(click.Command):
    """A command whose option --wait-for-store takes its value only after a ``=``: what follows it is a name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        wait = f"--wait-for-store={STORE_WAIT_S:.0f}"
        return super().parse_args(ctx, [wait if each == "--wait-for-store" else each for each in args])


@click.command(cls=_WaitsForStore, epilog=examples("mountctl up", "mountctl up --wait-for-store models"))
@names_argument
@click.option(
    "--wait-for-store",
    "wait_s",
    type=click.FloatRange(min=0),
    metavar="[=SECONDS]",
    help="Retry for a while, by default 5 minutes, if the store does not answer and the cache knows nothing of it. "
    "A mount whose cache knows its store starts at once.",
)
@mounts_directory
@reported
def up(names: tuple[str, ...], wait_s: float | None, directory: Path) -> int:
    """Mount the declared mounts NAME, or all of them. Mounts that are up stay up."""
    chosen, code = chosen_mounts(names, directory)
    if not chosen and code == 0:
        click.echo(f"no mount is declared: {directory} has no file NAME.toml", err=True)
    deadline, announced = time.monotonic() + (wait_s or 0), False
    while True:
        outcomes = {mount: _outcome(mount) for mount in chosen}
        code = max([code, *(each for each, _ in outcomes.values() if each != STORE_AWAY)])
        chosen = [mount for mount, (each, _) in outcomes.items() if each == STORE_AWAY]
        if not chosen or time.monotonic() >= deadline:
            break
        if not announced:
            announced = True
            waiting = ", ".join(mount.name for mount in chosen)
            click.echo(f"waiting up to {wait_s or 0:.0f} s for the store of {waiting}")
        time.sleep(STORE_INTERVAL_S)
    for mount in chosen:
        said = outcomes[mount][1]
        waits = wait_s is None and "check the network" in said  # no wait mends a file of authorities
        click.echo(said + (f", or wait for it: `mountctl up --wait-for-store {mount.name}`" if waits else ""), err=True)
    return max(code, STORE_AWAY) if chosen else code


def _outcome(mount: NamedMount) -> tuple[int, str]:
    """As `_up`; it prints an error with the name of its mount, and the other mounts go up."""
    try:
        return _up(mount)
    except (TrimsError, KeeperGoneError) as error:
        message = str(error)
        click.echo(f"mountctl: {message if mount.name in message else f'{mount.name}: {message}'}", err=True)
        return code_of(error), ""


def _up(mount: NamedMount) -> tuple[int, str]:
    """Bring a mount up; the exit code and, if that is STORE_AWAY, the message to print at the end."""
    if mount.file is None:
        raise NotMountedError(f"{mount.name} is not declared: use `trimsfs mount`, or a file in {DIRECTORY}")
    mounted = trimsfs_at(mount.mountpoint)
    if mounted is not None:
        facts = status_of(mount)
        if facts["state"] != DEAD:
            return _is_up(mount, mounted, facts), ""
        mounting.unmount(mount.mountpoint, lazy=True)
    made = [each for each in (mount.mountpoint, *mount.mountpoint.parents) if not each.exists()]
    try:
        mount.mountpoint.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MountpointError(f"{mount.name}: {mount.mountpoint}: {error.strerror}: name a directory") from error
    managed = mount.managed
    if managed:
        code, said = _start(mount)
    else:
        done = subprocess.run(mount.command(), stderr=subprocess.PIPE, text=True, check=False)
        code, said = done.returncode, done.stderr.rstrip()
        if said.startswith("trimsfs: ") and mount.name not in said:
            said = f"mountctl: {mount.name}: {said.removeprefix('trimsfs: ')}"
    if said and code != STORE_AWAY:
        click.echo(said, err=True)
    if code == 0:
        return without_store(mount, patience_s=PROBE_S), ""
    for each in made if not managed else ():  # the unit may be about to mount there
        with suppress(OSError):
            each.rmdir()
    return code, said


def _start(mount: NamedMount) -> tuple[int, str]:
    """Start the unit of a mount; the exit code, and why it failed.

    The unit of a detached mount runs while that is in use, and systemd has nothing to start: it is given DETACHED_S.
    Raises MountpointError if the unit still serves the mount point of an earlier declaration.
    """
    deadline = time.monotonic() + DETACHED_S
    while True:
        code, said = systemd.start(mount.name)
        if code != 0 or trimsfs_at(mount.mountpoint) is not None:
            return code, said
        if time.monotonic() >= deadline:
            break
        time.sleep(DETACHED_INTERVAL_S)
    served = unit_serves(mount)
    if served is not None:
        raise MountpointError(
            f"{mount.name}: its unit serves {served}, not {mount.mountpoint}: `mountctl down {mount.name}` first"
        )
    return exit_code(CacheInUseError.__name__), f"mountctl: {mount.name}: {_in_use(mount)}"


def _in_use(mount: NamedMount) -> str:
    """Who uses a detached mount, for an error message. Raises KeeperGoneError."""
    facts = ask(mount.mountpoint, {"do": "status"}, timeout_s=ANSWER_TIMEOUT_S)
    server, environment = facts["server_pid"], environment_of(facts)
    cache = mount.order(foreground=True, environment=environment)["options"]["cache_dir"]
    device = device_served_by(server)
    users = f" {usage(device)}" if device is not None else ""
    detached = f"its mount was detached and is in use{users}: end that"
    return f"cache directory {cache} is in use by another server, {shown(server)}; {detached}"


def _is_up(mount: NamedMount, mounted: Mount, facts: dict[str, Any]) -> int:
    """Report that a mount is up, or what it lacks; the exit code. *facts* are its status.

    Raises MountpointError if another store is mounted there.
    """
    order = mount.order(foreground=False, environment=environment_of(facts))
    if mounted.source != (store := order["source"]):
        raise MountpointError(
            f"{mount.name}: {mounted.source} is mounted at {mount.mountpoint}, not {store}: "
            "take it down, or choose another mountpoint"
        )
    if (code := _LACKING.get(facts["state"])) is not None:
        why = facts.get("error", f"see `mountctl logs {mount.name}`")
        click.echo(printable(f"mountctl: {mount.name}: {facts['state']} at {mount.mountpoint}: {why}"), err=True)
        return code
    click.echo(f"{mount.name} is up at {mount.mountpoint}")
    if changed := changed_options(mount.mountpoint, order["options"]):
        note = f"declared with other options ({', '.join(changed)}): `mountctl upgrade {mount.name}` applies them"
        click.echo(f"mountctl: {mount.name}: {note}", err=True)
    return without_store(mount)
