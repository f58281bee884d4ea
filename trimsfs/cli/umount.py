"""``trimsfs umount``."""

import os
import select
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import click

from trimsfs.cli.control_files import check_answers, read_json
from trimsfs.cli.output import fail, reported, say
from trimsfs.command_group import complete_mounted
from trimsfs.errors import InUseError, MountpointError, NotMountedError, NotPermittedError, TrimsError
from trimsfs.mountinfo import Mount, canonical, mount_of, mounts, trimsfs_at
from trimsfs.processes import usage

STOP_TIMEOUT_S = 20.0
"""How long the processes of a mount may take to end."""


@click.command()
@click.argument("mountpoint", type=Path, shell_complete=complete_mounted)
@click.option("--lazy", is_flag=True, help="Detach now; open files go on working until they are closed.")
@reported
def umount(mountpoint: Path, lazy: bool) -> None:
    """Unmount MOUNTPOINT; returns when its server has ended and its cache directory is free."""
    mountpoint = canonical(mountpoint)
    mount = trimsfs_at(mountpoint)
    if mount is None:
        on = mount_of(mountpoint)
        hint = f", but a path on the one at {on.mountpoint}" if on is not None else ""
        raise NotMountedError(f"{mountpoint}: no trimsfs mount{hint}")
    processes = [] if lazy else _processes(mountpoint)
    if os.geteuid() == 0:
        command = ["umount", "--internal-only", "--no-canonicalize", *(["--lazy"] if lazy else []), str(mountpoint)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "not found in" in done.stderr or "must be superuser" in done.stderr:
            raise NotPermittedError(f"{mountpoint} was mounted by another user: only that user and root can unmount it")
        if "busy" in done.stderr:
            raise InUseError(f"{mountpoint} is in use {_users(mount)}: end that, or use --lazy")
        raise MountpointError(f"{mountpoint}: {done.stderr.strip()}")
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while processes:
        ended, _, _ = select.select(processes, [], [], max(0, deadline - time.monotonic()))
        if not ended:
            still = f"{mountpoint} is unmounted, but its server has not ended in {STOP_TIMEOUT_S:.0f} s"
            fail("", f"{still}: it is used {usage(mount.device)}")
        processes = [process for process in processes if process not in ended]


def _users(mount: Mount) -> str:
    """Who keeps a mount from being unmounted."""
    above = [str(each.mountpoint) for each in mounts(None) if each.parent == mount.number]
    return f"by what is mounted on it, {', '.join(above)}" if above else str(usage(mount.device))


def _processes(mountpoint: Path) -> list[int]:
    """Pidfds of the mount's processes; none if it does not answer."""
    descriptors: list[int] = []
    try:
        check_answers(mountpoint)
        facts = read_json(mountpoint / ".trims/control")
        for name in ("server_pid", "keeper_pid"):
            if facts[name] is not None:  # as of a keeper that is gone
                with suppress(OSError):
                    descriptors.append(os.pidfd_open(facts[name]))
    except TrimsError:
        say(f"trimsfs: {mountpoint} does not answer: not waiting for its server to end", error=True)
    return descriptors
