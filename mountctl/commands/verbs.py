"""The subcommands for mounts: up, down, restart, upgrade, status, logs, abort and run.

None of them touches the mount itself, so they also work for a mount that hangs.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import click

from mountctl.commands.declared_mounts import DIRECTORY, NamedMount, declared_mounts, find_mount
from mountctl.keeper.control_socket import KeeperGoneError, ask
from mountctl.linux import mounting, systemd
from mountctl.linux.sd_notify import stored_descriptors
from trimsfs.errors import ConfigurationError, MountpointError, NotMountedError, TrimsError
from trimsfs.exit_codes import exit_code
from trimsfs.mountinfo import Mount, mounts, trimsfs_at
from trimsfs.text import printable

P = ParamSpec("P")

ANSWER_TIMEOUT_S = 5.0
DEAD = "dead"
"""The state of a mount whose keeper and servers have ended."""
REPLACE_TIMEOUT_S = 90.0

_mounts_directory = click.option(
    "--mounts-dir",
    "directory",
    type=click.Path(path_type=Path),
    envvar="TRIMSFS_MOUNTS_DIR",
    default=DIRECTORY,
    show_default=True,
    help="Directory of the files that declare mounts.",
)
_name = click.argument("name")
_names = click.argument("names", metavar="[NAME]...", nargs=-1)


def _reported(function: Callable[P, int | None]) -> Callable[P, None]:
    """A command that returns its exit code, and whose errors become one line and a documented exit code."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> None:
        try:
            code = function(*arguments, **named)
        except TrimsError as error:
            click.echo(f"mountctl: {printable(str(error))}", err=True)
            code = exit_code(type(error).__name__)
        except KeeperGoneError as error:
            click.echo(f"mountctl: {printable(str(error))}", err=True)
            code = exit_code(NotMountedError.__name__)
        except OSError as error:
            click.echo(f"mountctl: {error.filename}: {error.strerror}", err=True)
            code = 1
        sys.exit(code or 0)

    return call


@click.command()
@_names
@_mounts_directory
@_reported
def up(names: tuple[str, ...], directory: Path) -> int:
    """Mount the declared mounts NAME, or all of them. Mounts that are up stay up."""
    chosen, code = _chosen(names, directory)
    return max([code, *map(_up, chosen)])


def _up(mount: NamedMount) -> int:
    if mount.file is None:
        raise NotMountedError(f"{mount.name} is not declared: use `trimsfs mount`, or a file in {DIRECTORY}")
    mounted = trimsfs_at(mount.mountpoint)
    if mounted is not None:
        if _status_of(mount)["state"] != DEAD:
            return _is_up(mount, mounted)
        mounting.unmount(mount.mountpoint, lazy=True)
    mount.mountpoint.mkdir(parents=True, exist_ok=True)
    if systemd.manages(mount.name):
        return systemd.start(mount.name)
    return subprocess.run(mount.command(), check=False).returncode


def _is_up(mount: NamedMount, mounted: Mount) -> int:
    """Report that a mount is up. Raises MountpointError if another store is mounted there."""
    store = mount.order(foreground=False)["source"]
    if mounted.source != store:
        raise MountpointError(
            f"{mount.name}: {mounted.source} is mounted at {mount.mountpoint}, not {store}: "
            "take it down, or choose another mountpoint"
        )
    click.echo(f"{mount.name} is up at {mount.mountpoint}")
    return 0


@click.command()
@_names
@click.option("--lazy", is_flag=True, help="Detach now; open files go on working until they are closed.")
@_mounts_directory
@_reported
def down(names: tuple[str, ...], lazy: bool, directory: Path) -> int:
    """Unmount NAME, or all declared mounts."""
    chosen, code = _chosen(names, directory)
    return max([code, *(_down(mount, lazy=lazy) for mount in chosen)])


def _down(mount: NamedMount, *, lazy: bool) -> int:
    if trimsfs_at(mount.mountpoint) is None:
        click.echo(f"{mount.name} is down")
        return 0
    command = [sys.executable, "-m", "trimsfs", "umount", *(["--lazy"] if lazy else []), str(mount.mountpoint)]
    code = subprocess.run(command, check=False).returncode
    if code == 0 and mount.file is not None and systemd.manages(mount.name):
        return systemd.stop(mount.name)
    return code


@click.command()
@_name
@_mounts_directory
@_reported
def restart(name: str, directory: Path) -> None:
    """Replace the server of NAME, with the same options. Readers wait for some milliseconds."""
    _replace(find_mount(name, directory), {"do": "replace"})


@click.command()
@_name
@_mounts_directory
@_reported
def upgrade(name: str, directory: Path) -> None:
    """Replace the server of NAME by one of the installed version, with the options that are declared now.

    The new server starts beside the old one and takes over, while readers wait for some milliseconds. If it does not
    start, the old one keeps serving.
    """
    mount = find_mount(name, directory)
    request: dict[str, Any] = {"do": "replace"}
    if mount.file is not None:
        foreground = _status_of(mount).get("foreground", False)
        request["order"] = mount.order(foreground=foreground)
    _replace(mount, request)


def _replace(mount: NamedMount, request: dict[str, Any]) -> None:
    _check_mounted(mount)
    answer = ask(mount.mountpoint, request, timeout_s=REPLACE_TIMEOUT_S)
    if "error" in answer:
        kind = ConfigurationError if answer.get("kind") == ConfigurationError.__name__ else TrimsError
        raise kind(f"{mount.name}: {answer['error']}")
    click.echo(f"{mount.name}: the server is now pid {answer['server_pid']}")


@click.command()
@_names
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_mounts_directory
@_reported
def status(names: tuple[str, ...], as_json: bool, directory: Path) -> int:
    """Show NAME, or all mounts, declared or not: whether a server serves it, and how often one was restarted.

    Exit code 10 if one of them is not being served.
    """
    chosen, code = _chosen(names, directory)
    if not names:
        known = {mount.mountpoint for mount in chosen}
        chosen += [NamedMount(str(one.mountpoint), one.mountpoint) for one in mounts() if one.mountpoint not in known]
    found = [{"name": mount.name, "mountpoint": str(mount.mountpoint)} | _status_of(mount) for mount in chosen]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not found:
        click.echo("no mounts")
    else:
        for facts in found:
            click.echo(printable(_line(facts)))
    served = all(facts["state"] == "serving" for facts in found)
    return code if served else exit_code(NotMountedError.__name__)


def _line(facts: dict[str, Any]) -> str:
    line = f"{facts['name']}: {facts['state']} at {facts['mountpoint']}"
    if facts.get("server_pid"):
        line += f", server pid {facts['server_pid']}"
    if facts.get("restarts"):
        line += f", restarted {facts['restarts']} times"
    if facts.get("last_end"):
        ago_s = time.time() - facts["last_end_at"]
        line += f", the last one ended {ago_s:.0f} s ago: {facts['last_end']}"
    return line + (f": {facts['error']}" if "error" in facts else "")


def _status_of(mount: NamedMount) -> dict[str, Any]:
    """The status of a mount, from the kernel's mount table and from its keeper."""
    if trimsfs_at(mount.mountpoint) is None:
        return {"state": "down"}
    try:
        return ask(mount.mountpoint, {"do": "status"}, timeout_s=ANSWER_TIMEOUT_S)
    except KeeperGoneError as error:
        return {"state": _state_without_keeper(mount.mountpoint), "error": str(error)}


def _state_without_keeper(mountpoint: Path) -> str:
    """Whether a server still answers. A child process asks, as one that waits for a mount cannot be killed."""
    command = ["stat", "-f", "--", str(mountpoint)]
    environment = {**os.environ, "LC_ALL": "C"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, message = process.communicate(timeout=ANSWER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return "hanging"
    return DEAD if b"not connected" in message else "not kept"


@click.command()
@_name
@click.option("-n", "--lines", default=50, show_default=True, help="Number of lines to show, from the end.")
@click.option("-f", "--follow", is_flag=True, help="Show new lines as they are written.")
@_mounts_directory
@_reported
def logs(name: str, lines: int, follow: bool, directory: Path) -> int:
    """Show the log of NAME."""
    mount = find_mount(name, directory)
    facts = _status_of(mount)
    if mount.file is not None and (systemd.manages(mount.name) or facts.get("foreground")):
        command = ["journalctl", f"--unit={systemd.unit_of(mount.name)}", f"--lines={lines}"]
        return subprocess.run([*command, *(["--follow"] if follow else [])], check=False).returncode
    file = facts.get("log_file")
    if file is None and mount.file is not None:
        file = mount.order(foreground=False)["options"]["log_file"]
    if file is None:
        raise NotMountedError(f"{mount.name}: no trimsfs mount, and none is declared")
    return subprocess.run(["tail", f"--lines={lines}", *(["-F"] if follow else []), "--", file], check=False).returncode


@click.command()
@_name
@_mounts_directory
@_reported
def abort(name: str, directory: Path) -> None:
    """Abort the FUSE connection of NAME: processes that wait for it get an error at once, and the keeper unmounts it.

    The last resort for a server that does not answer. Exit codes: 0 done, 1 not allowed, 10 no trimsfs mount there.
    """
    mount = find_mount(name, directory)
    try:
        mounting.abort(mount.mountpoint)
    except LookupError as error:
        raise NotMountedError(error.args[0]) from error


@click.command(hidden=True)
@_name
@_mounts_directory
@_reported
def run(name: str, directory: Path) -> None:
    """Mount NAME and stay in the foreground, for a service manager; take over the mount that an earlier run left."""
    mount = find_mount(name, directory)
    if mount.file is None:
        raise NotMountedError(f"{name} is not declared")
    stored = stored_descriptors(os.environ)
    if "fuse" not in stored:
        mount.mountpoint.mkdir(parents=True, exist_ok=True)
        os.execv(sys.executable, mount.command(foreground=True))
    os.lseek(stored["order"], 0, os.SEEK_SET)
    os.dup2(stored["order"], 0)
    for descriptor in stored.values():
        os.set_inheritable(descriptor, True)
    os.execv(sys.executable, [sys.executable, "-m", "mountctl.keeper"])


def _chosen(names: tuple[str, ...], directory: Path) -> tuple[list[NamedMount], int]:
    """The mounts of these names, or all declared ones, and the exit code for invalid files."""
    if names:
        return [find_mount(name, directory) for name in names], 0
    found, problems = declared_mounts(directory)
    for problem in problems:
        click.echo(f"mountctl: {problem}", err=True)
    return found, exit_code(type(problems[0]).__name__) if problems else 0


def _check_mounted(mount: NamedMount) -> None:
    if trimsfs_at(mount.mountpoint) is None:
        raise NotMountedError(f"{mount.name}: no trimsfs mount at {mount.mountpoint}")
