"""Mount propagation: shares directories, in which running containers see later mounts."""

import os
import stat
from pathlib import Path

from mountctl.containers.mountpoints import is_shared
from mountctl.linux import bind_mounts
from trimsfs.errors import ConfigurationError, MountpointError, NoSuchEntryError, NotPermittedError, TrimsError
from trimsfs.mountinfo import mount_at, mount_of, mounts


def share(directory: Path) -> bool:
    """Make a directory a shared mount point; False if it is one already. Raises TrimsError."""
    path = Path(os.path.realpath(directory.parent), directory.name) if directory.name else directory
    if mount_of(path) is not None:
        raise ConfigurationError(f"{path}: lies on a trimsfs mount: share the directory that holds the mount point")
    path = Path(os.path.realpath(path))
    if path == Path("/"):
        raise ConfigurationError(
            "/: sharing it would give containers the whole host: choose a directory for mount points"
        )
    if is_shared(path):
        return False
    try:
        _share(path)
    except PermissionError as error:
        raise NotPermittedError(
            f"{path}: {os.strerror(error.errno or 0)}: run this as root with CAP_SYS_ADMIN"
        ) from None
    except FileNotFoundError:
        raise NoSuchEntryError(f"{path} does not exist: create it with `mkdir -p`") from None
    except OSError as error:
        raise TrimsError(f"{path}: {os.strerror(error.errno or 0)}") from None
    return True


def _share(path: Path) -> None:
    directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(directory).st_mode):
            raise ConfigurationError(f"{path}: not a directory: choose a directory for mount points")
        if mount_at(path) is not None:
            bind_mounts.propagate(directory, bind_mounts.MS_SHARED)
            return
        # No mount is at the directory itself.
        if below := [mount.mountpoint for mount in mounts(None) if mount.mountpoint.is_relative_to(path)]:
            raise MountpointError(f"{path}: {below[0]} is mounted below: unmount it, share {path}, mount it again")
        tree = bind_mounts.clone(directory)
        try:
            # A clone joins the peer group of its original: mounts made below it would also appear there.
            bind_mounts.propagate(tree, bind_mounts.MS_PRIVATE)
            bind_mounts.propagate(tree, bind_mounts.MS_SHARED)
            bind_mounts.move(tree, directory)
        finally:
            os.close(tree)
    finally:
        os.close(directory)
