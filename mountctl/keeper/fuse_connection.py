"""What outlives the servers of a mount: the FUSE connection, the ledger, and the lock of the cache directory.

A keeper locks the ledger, so that a mount has one keeper at a time.
"""

import contextlib
import errno
import fcntl
import os
import select
import stat
import subprocess
from collections.abc import Mapping
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from mountctl.linux import mounting
from mountctl.linux.mounting import MountIdentity
from trimsfs.processes import usage

_FOR_SERVERS = ("ledger", "lock", "fuse")
STORED = (*_FOR_SERVERS, "order")
"""The names under which a service manager stores what the next keeper needs."""
_MAGIC = b"trimsfs"
"""The first bytes of a ledger, before its version."""
_MAGIC_LENGTH = 8
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class AlreadyKeptError(Exception):
    """Another keeper has the mount."""


def memory_of(content: bytes) -> int:
    """A sealed memfd with this content, positioned at its start."""
    descriptor = os.memfd_create("trimsfs-order", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _locked(ledger: int) -> int:
    """Lock a ledger through an open file of its own; the descriptor of that file. Raises AlreadyKeptError."""
    descriptor = os.open(f"/proc/self/fd/{ledger}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyKeptError from None
    return descriptor


def ledger_version(ledger: int) -> str:
    return os.pread(ledger, _MAGIC_LENGTH, 0).removeprefix(_MAGIC).decode(errors="replace")


class Connection:
    """The descriptors of one mount; *stored* are those of an earlier keeper by name, *identity* its file system.

    Once this mount is detached but still in use, another may be mounted at the same mount point: the methods act on
    this one only. Raises AlreadyKeptError.
    """

    def __init__(
        self,
        mountpoint: Path,
        *,
        source: str,
        allow_other: bool,
        stored: Mapping[str, int] | None = None,
        identity: MountIdentity | None = None,
    ) -> None:
        self._mountpoint = mountpoint
        self._source = source
        self._allow_other = allow_other
        self._held = {name: descriptor for name, descriptor in (stored or {}).items() if name in STORED}
        self.inherited = "fuse" in self._held
        """Whether an earlier keeper mounted it."""
        if "ledger" not in self._held:
            self._held["ledger"] = os.memfd_create("trimsfs-ledger", os.MFD_CLOEXEC)
        self._locks = [_locked(self._held["ledger"])]
        self.identity = identity or (mounting.identify(mountpoint) if self.mounted else None)
        """The mounted file system; None before it is mounted, or if it was unmounted at once."""

    @classmethod
    def of(cls, order: dict[str, Any], stored: Mapping[str, int]) -> "Connection":
        """The connection of an order, which has the identity of the mount if an earlier keeper stored it."""
        known = order.get("identity")
        return cls(
            Path(order["mountpoint"]),
            source=str(order["source"]),
            allow_other=bool(order["allow_other"]),
            stored=stored,
            identity=MountIdentity(**known) if known is not None else None,
        )

    @property
    def mounted(self) -> bool:
        """Whether a keeper has mounted it."""
        return "fuse" in self._held

    @property
    def gone(self) -> bool:
        """Whether it is unmounted and none of its files is open, or its connection was aborted."""
        poll = select.poll()
        poll.register(self._held["fuse"], 0)
        return bool(poll.poll(0))

    def for_server(self) -> dict[str, int]:
        """The descriptors that a server gets when it is promoted, by name."""
        return {name: descriptor for name, descriptor in self._held.items() if name in _FOR_SERVERS}

    def stored(self, order: bytes) -> dict[str, int]:
        """The descriptors that the next keeper needs, by name, with a new one for *order*."""
        before = self._held.pop("order", None)
        if before is not None:
            os.close(before)
        self._held["order"] = memory_of(order)
        return dict(self._held)

    @property
    def ledger_version(self) -> str | None:
        """The version of the ledger that an earlier keeper has left; None if none did."""
        return ledger_version(self._held["ledger"]) if self.inherited else None

    def mount(self, lock: int) -> dict[str, Any]:
        """Mount, and keep the lock of the cache directory; {} or the error, as the answer to the server."""
        try:
            self._held["fuse"] = mounting.mount(self._mountpoint, source=self._source, allow_other=self._allow_other)
        except (mounting.FuseUnavailableError, mounting.MountpointError, OSError) as error:
            os.close(lock)
            kind = mounting.FuseUnavailableError if isinstance(error, OSError) else type(error)
            return {"kind": kind.__name__, "error": str(error)}
        self._held["lock"] = lock
        self.identity = mounting.identify(self._mountpoint)
        return {}

    def open_backings(self, files: list[int], count: int) -> list[dict[str, Any]]:
        """Register *count* backing files; the id or the error of each, as the answer to the server."""
        # The kernel drops descriptors for which this process has no room.
        return [self._open_backing(file) for file in islice(chain(files, repeat(None)), count)]

    def _open_backing(self, file: int | None) -> dict[str, Any]:
        try:
            if file is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if not _readable(file):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return {"id": mounting.open_backing(self._held["fuse"], file)}
        except OSError as error:
            return {"errno": error.errno, "error": error.strerror}

    def close_backing(self, number: int) -> None:
        with contextlib.suppress(OSError):  # the connection may be gone, or the id
            mounting.close_backing(self._held["fuse"], number)

    def unmount(self) -> str | None:
        """Unmount, lazily if that fails; the reason if it failed or files are still in use, else None."""
        if not self.mounted:
            return None
        if not self._is_in_tree:
            return None if self.gone else f"is still in use {self._users()}, though it is no longer mounted there"
        try:
            mounting.unmount(self._mountpoint)
        except (OSError, subprocess.SubprocessError) as error:
            problem = f"is in use {self._users()}" if "busy" in str(error) else str(error)
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                mounting.unmount(self._mountpoint, lazy=True)
            return problem
        return None

    def _users(self) -> str:
        return str(usage(self.identity.device)) if self.identity is not None else "by an unknown process"

    def abort(self) -> None:
        """Abort the FUSE connection: requests that wait for an answer fail."""
        if self.identity is not None and not self.gone:  # else its device number may be another's by now
            with contextlib.suppress(OSError):
                mounting.abort_device(self.identity.device)

    def close(self) -> None:
        """Close everything, and unmount if it is still mounted."""
        held, self._held = self._held, {}
        locks, self._locks = self._locks, []
        for descriptor in (*held.values(), *locks):
            os.close(descriptor)
        # Once /dev/fuse is closed, the kernel fails requests that wait, and the unmount cannot block.
        if "fuse" in held and self._is_in_tree:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                mounting.unmount(self._mountpoint, lazy=True)

    @property
    def _is_in_tree(self) -> bool:
        """Whether this file system is still mounted at its mount point, with nothing over it."""
        return self.identity is not None and self.identity.is_at(self._mountpoint)


def _readable(file: int) -> bool:
    """Whether the sender of a descriptor can read the file: the kernel will read it with this process's privileges.

    Anybody can open any file with O_PATH.
    """
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    return (
        not flags & os.O_PATH
        and flags & os.O_ACCMODE in {os.O_RDONLY, os.O_RDWR}
        and stat.S_ISREG(os.fstat(file).st_mode)
    )
