"""The subcommands that services and containers run in the foreground: keeper, serve and run."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from mountctl.commands.declared_mounts import NamedMount, find_mount
from mountctl.commands.mount_status import ANSWER_TIMEOUT_S
from mountctl.commands.outcome import reported
from mountctl.commands.verbs import mounts_directory, name_argument
from mountctl.keeper.fuse_connection import memory_of
from mountctl.keeper.launching.launcher_socket import check as check_keeper
from mountctl.linux import mounting
from mountctl.linux.sd_notify import Notifier, stored_descriptors
from trimsfs.command_group import examples
from trimsfs.errors import NotMountedError


@click.command(epilog=examples("mountctl keeper /models", "mountctl keeper --check /models"))
@name_argument
@click.option("--check", is_flag=True, help="Only ask whether this keeper answers, for a probe.")
@mounts_directory
@reported
def keeper(name: str, check: bool, directory: Path) -> None:
    """Hold a mount for servers of another container.

    Runs in the foreground and waits for `trimsfs serve` with the same mount point. The mount outlives its servers, and
    this keeper too, as long as one of both runs. A newly started keeper follows the one before.

    Exit codes of --check: 0 the keeper answers, 10 it does not.
    """
    mount = find_mount(name, directory, exact=True)
    if check:
        answer = check_keeper(mount.mountpoint, timeout_s=ANSWER_TIMEOUT_S)
        click.echo(f"{mount.name}: its keeper answers, trimsfs {answer['version']}, protocol {answer['protocol']}")
        return
    os.execv(sys.executable, [sys.executable, "-m", "mountctl.keeper", "--hold", str(mount.mountpoint)])


@click.command(hidden=True, epilog=examples("mountctl serve models"))
@name_argument
@mounts_directory
@reported
def serve(name: str, directory: Path) -> None:
    """Serve the declared mount NAME, which `mountctl keeper NAME` holds, for a service manager."""
    mount = _declared(name, directory)
    os.execv(sys.executable, mount.command("serve"))


@click.command(hidden=True, epilog=examples("mountctl run models"))
@name_argument
@mounts_directory
@reported
def run(name: str, directory: Path) -> None:
    """Mount NAME in the foreground, for a service manager; take over the mount if an earlier run left it."""
    mount = _declared(name, directory)
    stored = stored_descriptors(os.environ)
    if "fuse" not in stored:
        _forget(stored)
        if mounting.detach_dead(mount.mountpoint, timeout_s=ANSWER_TIMEOUT_S):
            click.echo(f"mountctl: {mount.name}: detached the mount of a keeper and a server that have ended", err=True)
        mount.mountpoint.mkdir(parents=True, exist_ok=True)
        os.execv(sys.executable, mount.command("mount", "--foreground"))
    if "order" in stored:
        os.lseek(stored["order"], 0, os.SEEK_SET)
        os.dup2(stored["order"], 0)
    else:  # a keeper was killed while it stored another
        os.dup2(memory_of(json.dumps(mount.order(foreground=True)).encode()), 0)
    for descriptor in stored.values():
        os.set_inheritable(descriptor, True)
    os.execv(sys.executable, [sys.executable, "-m", "mountctl.keeper"])


def _forget(stored: Mapping[str, int]) -> None:
    """Have what is left of an earlier mount closed, here and by the manager: the keeper of a new one would take it."""
    Notifier(os.environ).unstore(tuple(stored))
    for descriptor in stored.values():
        os.close(descriptor)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)


def _declared(name: str, directory: Path) -> NamedMount:
    """The declared mount of a name. Raises ConfigurationError and NotMountedError."""
    mount = find_mount(name, directory)
    if mount.file is None:
        raise NotMountedError(f"{name} is not declared")
    return mount
