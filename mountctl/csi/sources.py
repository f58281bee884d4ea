"""The mounts that volumes are taken from: those right below one directory, each known by its name there."""

import os
from pathlib import Path

import grpc

from mountctl.csi.refusals import RefusedError, invalid, unavailable
from mountctl.csi.requests import mount_name
from trimsfs.mountinfo import Mount, trimsfs_at


class Sources:
    """The mounts of a directory. Only the directory and the kernel's table are read: no mount is touched."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        """The mount points there are, mounted or not. Raises RefusedError (UNAVAILABLE)."""
        try:
            entries = sorted(os.listdir(self.directory))
        except OSError as error:
            raise unavailable(f"{self.directory}: {error.strerror}: is it mounted into the container?") from None
        return [name for name in entries if _is_name(name)]

    def name(self, wanted: str | None) -> str:
        """The name of the wanted mount, or of the only one. Raises RefusedError."""
        if wanted is not None:
            return wanted
        names = self.names()
        if not names:
            raise unavailable(f"{self.directory}: there is no mount: `trimsfs mount {self.directory}/NAME` makes one")
        if len(names) > 1:
            raise invalid(f"volumeAttributes: mount is missing: there are {', '.join(names)}")
        return names[0]

    def find(self, name: str) -> Mount:
        """The mount of that name. Raises RefusedError: NOT_FOUND, or UNAVAILABLE where it may come yet."""
        path = self.directory / name
        mounted = trimsfs_at(path)
        if mounted is not None:
            return mounted
        names = self.names()
        if name in names:
            raise unavailable(f"{path} is not mounted: is its server running?")
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise RefusedError(
            grpc.StatusCode.NOT_FOUND,
            f"volumeAttributes: mount {name}: there is no such mount in {self.directory}: {there}",
        )

    def devices(self) -> set[str]:
        """The devices of the file systems that are mounted there now."""
        mounted = (trimsfs_at(self.directory / name) for name in self.names())
        return {mount.device for mount in mounted if mount is not None}


def _is_name(name: str) -> bool:
    try:
        return bool(mount_name(name))
    except RefusedError:
        return False
