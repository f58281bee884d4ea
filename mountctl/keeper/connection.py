"""What outlives every server of a mount: the connection to the kernel, the ledger and the lock of the cache."""

import contextlib
import errno
import fcntl
import os
import select
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mountctl.linux import mounting
from mountctl.linux.mounting import Identity

_FOR_SERVERS = ("ledger", "lock", "fuse")
STORED = (*_FOR_SERVERS, "order")
"""The names by which a service manager has what an earlier keeper's successor needs."""


def memory_of(content: bytes) -> int:
    """A descriptor of memory with this content, to be read from its start."""
    descriptor = os.memfd_create("trimsfs-order", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Connection:
    """The descriptors of one mount. Those of an earlier keeper, by their names, are gone on with, and so is what that
    has known of its file system.

    Others may be mounted at the same place once this one has been taken from there, while it is still in use or its
    server has not ended: what is done here is done to this one only.
    """

    def __init__(
        self,
        mountpoint: Path,
        *,
        source: str,
        allow_other: bool,
        stored: Mapping[str, int] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self._mountpoint = mountpoint
        self._source = source
        self._allow_other = allow_other
        self._held = {name: descriptor for name, descriptor in (stored or {}).items() if name in STORED}
        if "ledger" not in self._held:
            self._held["ledger"] = os.memfd_create("trimsfs-ledger", os.MFD_CLOEXEC)
        self.identity = identity or (mounting.identify(mountpoint) if self.mounted else None)
        """Of the file system; None before it is mounted, or if it was gone at once."""

    @property
    def mounted(self) -> bool:
        """Whether there has been a mount."""
        return "fuse" in self._held

    @property
    def gone(self) -> bool:
        """Whether the file system is unmounted and nobody has a file of it open, or its connection was aborted."""
        poll = select.poll()
        poll.register(self._held["fuse"], 0)
        return bool(poll.poll(0))

    def held(self) -> dict[str, int]:
        """The descriptors by their names."""
        return {name: descriptor for name, descriptor in self._held.items() if name in _FOR_SERVERS}

    def stored(self, order: bytes) -> dict[str, int]:
        """The descriptors that an earlier keeper's successor needs, with one for the order of now."""
        before = self._held.pop("order", None)
        if before is not None:
            os.close(before)
        self._held["order"] = memory_of(order)
        return dict(self._held)

    def mount(self, lock: int) -> dict[str, Any]:
        """Mount, and keep the lock of the cache directory; what there is to say if it cannot be done."""
        try:
            self._held["fuse"] = mounting.mount(self._mountpoint, source=self._source, allow_other=self._allow_other)
        except (mounting.FuseUnavailableError, mounting.MountpointError) as error:
            os.close(lock)
            return {"kind": type(error).__name__, "error": str(error)}
        self._held["lock"] = lock
        self.identity = mounting.identify(self._mountpoint)
        return {}

    def open_backing(self, files: list[int]) -> dict[str, Any]:
        """Register the file of a descriptor; its id, or the error."""
        try:
            if not files:  # the kernel drops a descriptor that there is no room for
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if not _readable(files[0]):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return {"id": mounting.open_backing(self._held["fuse"], files[0])}
        except OSError as error:
            return {"errno": error.errno, "error": error.strerror}

    def close_backing(self, number: int) -> None:
        """Give a backing id up."""
        with contextlib.suppress(OSError):  # the connection may be gone, or the id
            mounting.close_backing(self._held["fuse"], number)

    def unmount(self) -> str | None:
        """Unmount; a busy mount is taken out of the tree. Why that was needed, if it was."""
        if not self.mounted:
            return None
        if not self._is_in_tree:
            return None if self.gone else "is in use, though it is not mounted there any more"
        try:
            mounting.unmount(self._mountpoint)
        except (OSError, subprocess.SubprocessError) as error:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                mounting.unmount(self._mountpoint, lazy=True)
            return str(error)
        return None

    def abort(self) -> None:
        """Have the kernel fail what still waits for an answer."""
        if self.identity is not None and not self.gone:  # else its number may be another's by now
            with contextlib.suppress(OSError):
                mounting.abort_device(self.identity.device)

    def close(self) -> None:
        """Let go of everything, the mount included if it is still there."""
        held, self._held = self._held, {}
        for descriptor in held.values():
            os.close(descriptor)
        # Without the descriptor the kernel fails what still waits for an answer, and the unmount cannot block.
        if "fuse" in held and self._is_in_tree:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                mounting.unmount(self._mountpoint, lazy=True)

    @property
    def _is_in_tree(self) -> bool:
        """Whether the file system is mounted where it was mounted, with nothing over it."""
        return self.identity is not None and self.identity.is_at(self._mountpoint)


def _readable(file: int) -> bool:
    """Whether who sent a descriptor can read the file itself: the kernel reads it with this process's privileges.

    A descriptor that only names a file can be had of any file.
    """
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    return (
        not flags & os.O_PATH
        and flags & os.O_ACCMODE in {os.O_RDONLY, os.O_RDWR}
        and stat.S_ISREG(os.fstat(file).st_mode)
    )
