"""Mounts made by tests the way a user makes them: with the ``trimsfs`` command."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import run
from trimsfs import mountinfo
from trimsfs.control.metrics import parse
from trimsfs.options import SCALARS

TRIMSFS = str(Path(sys.executable).with_name("trimsfs"))
MOUNTCTL = str(Path(TRIMSFS).with_name("mountctl"))
COMMAND_TIMEOUT_S = 90
LAZY = "--lazy"
ENDINGS = 20
"""How often an unmount waits for containers of other tests to end, each time for a moment."""
BUSY_S = 10.0
"""How long umount(8) is tried: who looks at all mounts holds each for a moment."""
_COPIED = "in the mount namespace of"


def trimsfs(
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
    before: Sequence[str] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run ``trimsfs`` with these arguments, whatever it returns; TRIMSFS_* variables of the tests do not reach it.

    Arguments may be options that are no flags, see `settings`. *before* is a program that starts it, and sets limits.
    """
    arguments, variables = settings(arguments)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRIMSFS_")}
    return subprocess.run(
        [*before, TRIMSFS, *map(str, arguments)],
        env=inherited | {"TRIMSFS_CONFIG": "/dev/null"} | variables | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def mountctl(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, timeout_s: float = 120
) -> "subprocess.CompletedProcess[str]":
    """Run ``mountctl`` with these arguments, whatever it returns."""
    variables = os.environ | {"TRIMSFS_CONFIG": "/dev/null"} | dict(environment or {})
    return run(MOUNTCTL, *arguments, env=variables, timeout=timeout_s)


def settings(arguments: Sequence[str | Path]) -> tuple[tuple[str | Path, ...], dict[str, str]]:
    """The arguments of a command, and the variables of those that set options as a file does, such as ``fence=no``."""
    pairs = [str(each).partition("=") for each in arguments]
    variables = {f"TRIMSFS_{name.upper()}": value for name, sign, value in pairs if sign and name in SCALARS}
    rest = (each for each, (name, sign, _) in zip(arguments, pairs, strict=True) if not sign or name not in SCALARS)
    return tuple(rest), variables


@dataclass(frozen=True, slots=True)
class MountedStore:
    """A mount and where its cache is."""

    path: Path
    cache: Path

    def control(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.path / ".trims/control").read_text())
        return facts

    def metrics(self) -> dict[str, float]:
        return parse((self.path / ".trims/metrics").read_text())

    def info(self, name: str) -> dict[str, Any]:
        """What the mount says of a file."""
        path = self.path / name
        facts: dict[str, Any] = json.loads((path.parent / ".trims" / path.name / "info").read_text())
        return facts

    def log(self) -> str:
        return log_beside(self.path.parent).read_text()


@dataclass(frozen=True, slots=True)
class OwnDirectory:
    """A directory of a test's own, in the store and below a mount that other tests use as well."""

    store: Path
    path: Path
    mount: MountedStore


@contextmanager
def mounted(
    store: str | Path | None,
    directory: Path,
    *options: str | Path,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> Iterator[MountedStore]:
    """Mount *store* at ``directory/models`` with its cache in ``directory/cache``; unmounted at the end in any case.

    Without one, the *options* tell the store. *before* is as of `trimsfs`.
    """
    mountpoint, cache = directory / "models", directory / "cache"
    mountpoint.mkdir(parents=True, exist_ok=True)
    let_in(directory)
    if store is not None and "://" not in str(store):
        let_in(Path(store))
        for path in Path(store).rglob("*"):  # frameworks write some files for their owner alone
            if path.is_file() and not path.is_symlink():
                _allow(path, 0o044)
    places = ("--cache-dir", cache, "--log-file", log_beside(directory))
    stores = () if store is None else ("--store", store)
    done = trimsfs("mount", mountpoint, *stores, *places, *options, environment=environment, before=before)
    assert done.returncode == 0, done.stderr
    try:
        yield MountedStore(mountpoint, cache)
    finally:
        unmount(mountpoint)


def log_beside(directory: Path) -> Path:
    """The log of what is mounted in a directory, which holds nothing else."""
    return directory.parent / f"{directory.name}.log"


def let_in(directory: Path) -> None:
    """Let all users read a directory for temporary files, and enter those above it: servers are not root."""
    temporary = (Path(tempfile.gettempdir()), Path("/var/tmp"))
    for path in (directory, *directory.parents):
        if any(above in path.parents for above in temporary):
            _allow(path, 0o055)


def _allow(path: Path, bits: int) -> None:
    mode = path.stat().st_mode
    if mode & bits != bits:  # a file's times tell its content
        path.chmod(mode | bits)


def unmount(mountpoint: Path) -> None:
    """Unmount if mounted, busy or not, and wait for the server to be gone.

    Everywhere: containers of tests that run beside this one have copies of all mounts. Some end only with them.
    """
    done = again_while_copied(lambda: trimsfs("umount", "--everywhere", mountpoint))
    if _COPIED in done.stderr:
        trimsfs("umount", LAZY, mountpoint)
        return
    if done.returncode == 12:
        trimsfs("umount", LAZY, mountpoint)
        raise AssertionError(f"{mountpoint} was still in use: {done.stderr}")


def again_while_copied(
    unmounts: Callable[[], "subprocess.CompletedProcess[str]"],
) -> "subprocess.CompletedProcess[str]":
    """What a command that unmounts says, tried again while containers of other tests have copies of the mount."""
    for _ in range(ENDINGS):
        done = unmounts()
        if _COPIED not in done.stderr:
            break
    return done


def overlay(directory: Path, lower: Path) -> tuple[str | Path, ...]:
    """The command that mounts an overlay over *lower* at ``merged``; what is written goes to ``upper``."""
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={lower},upperdir={directory / 'upper'},workdir={directory / 'work'}"
    return "mount", "-t", "overlay", "-o", options, "overlay", directory / "merged"


def umount(path: Path) -> None:
    """Unmount with umount(8), tried again while it is busy."""
    deadline = time.monotonic() + BUSY_S
    while (
        (done := _in_english("umount", path)).returncode != 0 and "busy" in done.stderr and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert done.returncode == 0, done.stderr


def _in_english(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )


def unmount_dead() -> None:
    """Unmount what a run of the tests that was killed has left below its temporary directory, without a server."""
    for mount in mountinfo.mounts():
        # Looked at in another process, as one that waits for a server can only be killed.
        ours = Path(tempfile.gettempdir()) in mount.mountpoint.parents
        if ours and os.strerror(errno.ENOTCONN) in _in_english("stat", mount.mountpoint).stderr:
            trimsfs("umount", LAZY, mount.mountpoint)


def wait_until(
    condition: Callable[[], bool], timeout_s: float = 10, tolerate: type[Exception] | tuple[()] = ()
) -> None:
    """Return once the condition holds; errors of the kind *tolerate* count as not yet. Fails when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except tolerate:
            pass
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
