"""The lock file of a cache directory: only one server at a time may use the directory."""

import contextlib
import fcntl
import os
from pathlib import Path

from trimsfs.errors import CacheInUseError, CacheUnusableError
from trimsfs.processes import holders, shown, title_of
from trimsfs.text import TITLE_PREFIX, or_free_space


def lock_directory(directory: Path) -> int:
    """Make and lock the cache directory; returns the descriptor that holds the lock.

    Raises CacheInUseError and CacheUnusableError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(directory, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CacheInUseError(
            f"cache directory {directory} is in use by another server, {_who_holds(directory)}: "
            "unmount that, or set --cache-dir"
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise unusable(directory, error) from error
    write_pid(descriptor)
    return descriptor


def unusable(directory: Path, error: OSError) -> CacheUnusableError:
    """Why a cache directory cannot be used, and what to do."""
    remedy = or_free_space(error, "set --cache-dir")
    return CacheUnusableError(f"cache directory {directory}: {error.strerror}: {remedy}")


def holder_of(directory: Path) -> int | None:
    """The pid in the lock file: of the process that holds the lock, or last held it; None if there is none."""
    try:
        holder = (directory / "lock").read_text(errors="replace").strip()
    except OSError:
        return None
    return int(holder) if holder.isdecimal() else None


def lock_holders(directory: Path) -> list[int]:
    """The processes that have the lock file open, as far as this user may see."""
    try:
        status = os.stat(directory / "lock")
    except OSError:
        return []
    return holders(f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}").get(status.st_ino, [])


def _who_holds(directory: Path) -> str:
    """Who holds the lock, for an error message. A server that has ended may have left it to its launcher."""
    recorded, seen = holder_of(directory), lock_holders(directory)
    if recorded is None or (recorded not in seen and not title_of(recorded).startswith(TITLE_PREFIX)):
        recorded = seen[0] if seen else None  # the pid has ended, or is of another PID namespace
    return shown(recorded) if recorded is not None else "pid unknown"


def is_lock_of(descriptor: int, directory: Path) -> bool:
    """Whether a descriptor refers to a directory's present lock file, not to a removed one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(directory / "lock"))
    except OSError:
        return False


def write_pid(descriptor: int) -> None:
    """Write this process's pid into a lock file."""
    with contextlib.suppress(OSError):  # on a full disk, the error of another server lacks the pid
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
