"""Finds mounts in the kernel's mount table, without touching them: a mount may hang."""

import os
import stat
from pathlib import Path

from mountctl.linux.sockets import gpu_path
from trimsfs.errors import ConfigurationError, NotMountedError
from trimsfs.mountinfo import file_systems, mount_at, mounts, named_mountpoint, trimsfs_at

SHOWN = 5
"""How many mounts a message names."""


def mountpoint_of(given: Path | None, *, remedy: str = "name") -> Path:
    """The mount point of the *given* trimsfs mount or, for None, of the only one; *remedy* is how to choose one.

    Raises TrimsError.
    """
    if given is not None:
        mountpoint = named_mountpoint(given)
        if trimsfs_at(mountpoint) is None:
            raise NotMountedError(f"{mountpoint}: no trimsfs mount: `trimsfs status` lists them")
        return mountpoint
    mountpoints = sorted(mount.mountpoint for mount in file_systems())
    if not mountpoints:
        raise NotMountedError("there is no trimsfs mount: make one with `trimsfs mount`")
    if len(mountpoints) > 1:
        more = f" and {len(mountpoints) - SHOWN} more" if len(mountpoints) > SHOWN else ""
        names = ", ".join(map(str, mountpoints[:SHOWN]))
        raise ConfigurationError(f"there are {len(mountpoints)} trimsfs mounts: {remedy} one of {names}{more}")
    return mountpoints[0]


def gpu_socket(mountpoint: Path) -> Path | None:
    """The socket of a mount's GPU clients, if there is one."""
    path = gpu_path(mountpoint)
    try:
        return path if stat.S_ISSOCK(path.lstat().st_mode) else None
    except OSError:
        return None


def is_shared(mountpoint: Path) -> bool:
    """Whether later mounts below a mount point propagate to containers; False if it is no mount point."""
    mounted = mount_at(mountpoint)
    return mounted is not None and mounted.shared != 0


def holds_mountpoints_only(directory: Path) -> bool:
    """Whether a directory holds trimsfs mount points and nothing else."""
    known = {mount.mountpoint for mount in mounts()}
    return all(directory / name in known for name in os.listdir(directory))
