"""The directory with the mounts that pods may use, by name."""

import os
from pathlib import Path

import grpc

from mountctl.extras.csi.csi_requests import mount_name
from mountctl.extras.csi.status_errors import StatusError, invalid, unavailable
from trimsfs.mountinfo import Mount, mount_at, trimsfs_at


class MountsDirectory:
    """Finds mounts by name. It reads only the directory and the kernel's mount table, because a mount may hang."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The names of all mount points, mounted or not. Raises StatusError (UNAVAILABLE)."""
        try:
            entries = sorted(os.listdir(self.path))
        except OSError as error:
            raise unavailable(f"{self.path}: {error.strerror}: mount it into the driver's container") from None
        return [name for name in entries if _is_name(name)]

    def resolve(self, name: str | None, target: Path) -> str:
        """The name of the requested mount, of the one that is at a *target*, or of the only one. Raises StatusError."""
        if name is not None:
            return name
        names = self.names()
        if not names:
            raise unavailable(f"{self.path}: there is no mount: make one with `trimsfs mount {self.path}/NAME`")
        if len(names) > 1:
            there = mount_at(target)  # published while there was one mount, and published again for its token
            device = None if there is None else there.device
            same = [each for each in names if (mount := trimsfs_at(self.path / each)) and mount.device == device]
            if len(same) == 1:
                return same[0]
            raise invalid(f"volumeAttributes: mount is missing: choose one of {', '.join(names)}")
        return names[0]

    def find(self, name: str) -> Mount:
        """The mount of that name. Raises StatusError: NOT_FOUND, or UNAVAILABLE if it is not mounted now."""
        path = self.path / name
        mounted = trimsfs_at(path)
        if mounted is not None:
            return mounted
        names = self.names()
        if name in names:
            raise unavailable(f"{path} is not mounted: mount it, or see its log")
        there = f"choose one of {', '.join(names)}" if names else "there is none"
        raise StatusError(
            grpc.StatusCode.NOT_FOUND,
            f"volumeAttributes: mount {name}: no such mount in {self.path}: {there}",
        )

    def by_device(self) -> dict[str, Mount]:
        """The mounts, each by the device of its file system. Raises StatusError (UNAVAILABLE)."""
        mounted = (trimsfs_at(self.path / name) for name in self.names())
        return {mount.device: mount for mount in mounted if mount is not None}


def _is_name(name: str) -> bool:
    try:
        return bool(mount_name(name))
    except StatusError:
        return False
