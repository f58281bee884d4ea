"""The subcommands for mounts but `up`: down, restart, upgrade, status, logs, recover and abort.

None of them touches the mount itself but in child processes, so they also work for a mount that hangs.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mountctl.commands.declared_mounts import DIRECTORY, NamedMount, complete_mount, declared_mounts, find_mount
from mountctl.commands.mount_status import (
    ANSWER_TIMEOUT_S,
    DEAD,
    DEGRADED,
    HIDDEN,
    NOT_KEPT,
    PROBE_S,
    environment_of,
    public_status,
    status_of,
    with_store,
    without_store,
)
from mountctl.commands.outcome import reported
from mountctl.keeper.control_socket import KeeperGoneError, ask
from mountctl.linux import mounting, systemd
from trimsfs.command_group import examples
from trimsfs.errors import (
    ConfigurationError,
    NoSuchEntryError,
    NotMountedError,
    NotPermittedError,
    TakeoverError,
    TrimsError,
)
from trimsfs.exit_codes import exit_code
from trimsfs.mountinfo import file_systems, mount_of, trimsfs_at
from trimsfs.text import printable

REPLACE_TIMEOUT_S = 90.0
mounts_directory = click.option(
    "--mounts-dir",
    "directory",
    type=click.Path(path_type=Path),
    envvar="TRIMSFS_MOUNTS_DIR",
    default=DIRECTORY,
    show_default=True,
    help="Directory of the files that declare mounts.",
)
name_argument = click.argument("name", shell_complete=complete_mount)
names_argument = click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete_mount)


@click.command(epilog=examples("mountctl down models"))
@names_argument
@click.option("--lazy", is_flag=True, help="Detach now; open files go on working until they are closed.")
@click.option("--everywhere", is_flag=True, help="Also unmount it in containers, and its bind mounts on this host.")
@mounts_directory
@reported
def down(names: tuple[str, ...], lazy: bool, everywhere: bool, directory: Path) -> int:
    """Unmount NAME, or all declared mounts, as `trimsfs umount` does."""
    chosen, code = chosen_mounts(names, directory, exact=True)
    options = [name for name, given in (("--lazy", lazy), ("--everywhere", everywhere)) if given]
    return max([code, *(_down(mount, options) for mount in chosen)])


def _down(mount: NamedMount, options: list[str]) -> int:
    managed, mountpoint = mount.managed, mount.mountpoint
    if mount.file is not None and mount_of(mountpoint) is None:
        served = unit_serves(mount) if managed else None
        if served is None:
            code = systemd.stop(mount.name) if managed and systemd.retries(mount.name) else 0
            click.echo(f"{mount.name} is down")
            return code
        mountpoint = served
    command = [sys.executable, "-m", "trimsfs", "umount", *options, str(mountpoint)]
    code = subprocess.run(command, check=False).returncode
    # The unit of a detached mount ends with the last user of the mount.
    return systemd.stop(mount.name) if code == 0 and managed and "--lazy" not in options else code


def unit_serves(mount: NamedMount) -> Path | None:
    """The mount point that a declared mount's service serves, which may be that of an earlier declaration."""
    process = systemd.main_process(mount.name)
    for one in file_systems() if process else []:
        with suppress(KeeperGoneError):
            if ask(one.mountpoint, {"do": "status"}, timeout_s=ANSWER_TIMEOUT_S).get("keeper_pid") == process:
                return one.mountpoint
    return None


@click.command(epilog=examples("mountctl restart models", "mountctl restart /models"))
@name_argument
@mounts_directory
@reported
def restart(name: str, directory: Path) -> int:
    """Replace the server, with the same options.

    Readers pause for tens of milliseconds on an idle machine. Exits 1 if the new server serves without its store.
    """
    return _replace(find_mount(name, directory), {"do": "replace"})


@click.command(epilog=examples("mountctl upgrade models", "mountctl upgrade /models"))
@name_argument
@mounts_directory
@reported
def upgrade(name: str, directory: Path) -> int:
    """Replace the server by one of the installed version.

    The new server gets the options that are declared now. It starts beside the old one and takes over; readers pause
    for tens of milliseconds on an idle machine. If it does not start, the old one keeps serving. Exits 1 if the new
    server serves without its store.
    """
    mount = find_mount(name, directory)
    request: dict[str, Any] = {"do": "replace"}
    if mount.file is not None:
        facts = status_of(mount)
        request["order"] = mount.order(foreground=facts.get("foreground", False), environment=environment_of(facts))
    return _replace(mount, request)


def _replace(mount: NamedMount, request: dict[str, Any]) -> int:
    _check_mounted(mount)
    answer = ask(mount.mountpoint, request, timeout_s=REPLACE_TIMEOUT_S)
    if "error" in answer:
        kind = ConfigurationError if answer.get("kind") == ConfigurationError.__name__ else TrimsError
        raise kind(f"{mount.name}: {answer['error']}")
    click.echo(f"{mount.name}: the server is now pid {answer['server_pid']}")
    return without_store(mount, patience_s=PROBE_S)


@click.command(epilog=examples("mountctl status", "mountctl status --json models"))
@names_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@mounts_directory
@reported
def status(names: tuple[str, ...], as_json: bool, directory: Path) -> int:
    """Show whether mounts are served.

    Shows NAME, or all mounts, declared or not: whether a server serves it, and how often the keeper restarted one.

    Exits 1 if a mount is served without a keeper or its store, 10 if one is not served. Exits 11 if another user's
    mount denies access.
    A keeper tells only root and the user who mounted what it alone knows, such as how a server ended.
    """
    chosen, code = chosen_mounts(names, directory)
    if not names:
        known = {mounted.device for mount in chosen if (mounted := trimsfs_at(mount.mountpoint)) is not None}
        chosen += [NamedMount(str(one.mountpoint), one.mountpoint) for one in file_systems() if one.device not in known]
    statuses = [
        {"name": mount.name, "mountpoint": str(mount.mountpoint)} | with_store(mount, status_of(mount))
        for mount in chosen
    ]
    if as_json:
        shown = [{name: fact for name, fact in facts.items() if name != "environment"} for facts in statuses]
        click.echo(json.dumps(shown, indent=2))
    elif not statuses:
        click.echo("no mounts")
    else:
        for facts in statuses:
            click.echo(printable(_line(facts)))
    states = {facts["state"] for facts in statuses}
    if states - {"serving", NOT_KEPT, HIDDEN}:
        return exit_code(NotMountedError.__name__)
    if HIDDEN in states:
        return exit_code(NotPermittedError.__name__)
    without = NOT_KEPT in states or any(facts.get("store_problem") for facts in statuses)
    return code or (DEGRADED if without else 0)


def _line(facts: dict[str, Any]) -> str:
    line = f"{facts['name']}: {facts['state']} at {facts['mountpoint']}"
    if facts.get("server_pid"):
        line += f", server pid {facts['server_pid']}"
    if facts.get("restarts"):
        line += f", restarted {facts['restarts']} time{'s' if facts['restarts'] != 1 else ''}"
    if facts.get("last_end") and facts.get("last_end_at"):
        ago_s = time.time() - facts["last_end_at"]
        line += f", the last one ended {ago_s:.0f} s ago: {facts['last_end']}"
    if "hidden" in facts:
        line += f" ({facts['hidden']})"
    return line + "".join(f": {facts[what]}" for what in ("error", "store_problem", "store_note") if facts.get(what))


@click.command(epilog=examples("mountctl logs --follow models"))
@name_argument
@click.option("-n", "--lines", default=50, show_default=True, help="Number of lines to show, from the end.")
@click.option("-f", "--follow", is_flag=True, help="Show new lines as they are written.")
@mounts_directory
@reported
def logs(name: str, lines: int, follow: bool, directory: Path) -> int:
    """Show the log of NAME."""
    mount = find_mount(name, directory)
    facts = status_of(mount)
    if mount.managed and facts.get("foreground") is not False:
        command = ["journalctl", f"--unit={systemd.unit_of(mount.name)}", f"--lines={lines}"]
        code = subprocess.run([*command, *(["--follow"] if follow else [])], check=False).returncode
        return exit_code(NotPermittedError.__name__) if code == 1 and os.geteuid() != 0 else code
    file = facts.get("log_file")
    if file is None and "hidden" in facts:
        raise NotPermittedError(f"{mount.name}: {facts['hidden']}, which knows where the log is")
    if file is None and (mount.file is not None or facts["state"] == DEAD):
        file = mount.log_file
    if file is None and facts["state"] == NOT_KEPT:
        file = public_status(mount.mountpoint).get("log_file")
    if file is None and facts["state"] != NOT_KEPT:
        raise NotMountedError(f"{mount.name}: no trimsfs mount, and none is declared")
    if file is None or facts.get("foreground"):
        remedy = "see the log of its unit or container: `journalctl`, `kubectl logs`"
        raise NoSuchEntryError(f"{mount.name}: logs to standard error, not to a file: {remedy}")
    if not os.access(file, os.R_OK):
        Path(file).open("rb").close()  # raises an error that says why
    code = subprocess.run(["tail", f"--lines={lines}", *(["-F"] if follow else []), "--", file], check=False).returncode
    return code if code >= 0 else 128 - code


@click.command(epilog=examples("mountctl recover /models"))
@name_argument
@mounts_directory
@reported
def recover(name: str, directory: Path) -> None:
    """Replace the killed or stopped keeper of a mount.

    The mount stays, and open files stay open.

    The new keeper takes the mount over from the server that is left, and replaces that server; readers pause shortly.
    Exit codes: 0 done, 1 no takeover is possible or the keeper runs, 10 no server is left.
    """
    mount = find_mount(name, directory)
    _check_mounted(mount)
    keeper = status_of(mount).get("keeper_pid")
    if keeper is not None:
        raise TakeoverError(f"{mount.name}: its keeper, pid {keeper}, is alive: there is nothing to recover")
    if mount.managed and systemd.restarts(mount.name):
        raise TakeoverError(f"{mount.name}: systemd restarts its keeper: see systemctl status trimsfs@{mount.name}")
    from mountctl.keeper.succession.successor import recover as start_recovery  # noqa: PLC0415 - takes long

    report = start_recovery(mount.mountpoint, timeout_s=REPLACE_TIMEOUT_S)
    if report["type"] != "ready":
        click.echo(f"mountctl: {printable(report['error'])}", err=True)
        sys.exit(exit_code(report["kind"]))
    facts = ask(mount.mountpoint, {"do": "status"}, timeout_s=ANSWER_TIMEOUT_S)
    click.echo(f"{mount.name}: the keeper is now pid {facts['keeper_pid']}, the server pid {facts['server_pid']}")


@click.command(epilog=examples("mountctl abort /models"))
@name_argument
@mounts_directory
@reported
def abort(name: str, directory: Path) -> None:
    """Abort the connection of a mount to the kernel.

    Processes that wait for it get an error at once, and the keeper unmounts it.

    The last resort for a server that does not answer. Exit codes: 0 done, 10 no trimsfs mount there, 11 not allowed.
    """
    mount = find_mount(name, directory)
    try:
        mounting.abort(mount.mountpoint)
    except LookupError as error:
        raise NotMountedError(error.args[0]) from error


def chosen_mounts(names: tuple[str, ...], directory: Path, *, exact: bool = False) -> tuple[list[NamedMount], int]:
    """The mounts of these names, or all declared ones, and the exit code for invalid files."""
    if names:
        return [find_mount(name, directory, exact=exact) for name in names], 0
    mounts, problems = declared_mounts(directory)
    for problem in problems:
        click.echo(f"mountctl: {problem}", err=True)
    return mounts, exit_code(type(problems[0]).__name__) if problems else 0


def _check_mounted(mount: NamedMount) -> None:
    if trimsfs_at(mount.mountpoint) is None:
        remedy = f"`mountctl up {mount.name}`" if mount.file is not None else "mount it with `trimsfs mount`"
        raise NotMountedError(f"{mount.name}: no trimsfs mount at {mount.mountpoint}: {remedy}")
