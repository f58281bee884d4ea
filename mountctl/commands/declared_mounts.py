"""Reads the declared mounts: /etc/trimsfs/mounts.d/NAME.toml has a mount point and any options of ``trimsfs mount``."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mountctl.linux import systemd
from trimsfs.command_group import complete_mounted
from trimsfs.errors import ConfigurationError
from trimsfs.mountinfo import canonical, named_mountpoint, trimsfs_at

DIRECTORY = Path("/etc/trimsfs/mounts.d")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class NamedMount:
    """A mount and its name: that of the file that declares it, or the mount point of an undeclared one."""

    name: str
    mountpoint: Path
    file: Path | None = None

    @property
    def configs(self) -> list[Path]:
        """The configuration files of a declared mount, later ones winning."""
        from trimsfs.options import DEFAULT_CONFIG  # noqa: PLC0415 - takes long, and a probe needs no options

        assert self.file is not None
        return [*([DEFAULT_CONFIG] if DEFAULT_CONFIG.exists() else []), self.file]

    @property
    def log_file(self) -> Path | None:
        """The log that a declared mount has in the background; of an undeclared one, the default."""
        from trimsfs.options import load_options  # noqa: PLC0415

        return load_options({}, configs=self.configs if self.file else ()).resolved(self.mountpoint).log_file

    @property
    def managed(self) -> bool:
        """Whether systemd has a service for this declared mount: one that reads the same directory."""
        if self.file is None or not systemd.manages(self.name):
            return False
        directory = systemd.variables(self.name).get("TRIMSFS_MOUNTS_DIR") or DIRECTORY
        return Path(directory).resolve() == self.file.parent.resolve()

    def command(self, verb: str = "mount", *options: str) -> list[str]:
        """The command line of ``trimsfs mount``, or another *verb*, for a declared mount."""
        configs = [f"--config={file}" for file in self.configs]
        return [sys.executable, "-m", "trimsfs", verb, "--allow-empty", *configs, *options, str(self.mountpoint)]

    def order(self, *, foreground: bool, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The keeper's order for a declared mount, with options of this *environment*, or of this process's.

        Raises ConfigurationError.
        """
        from trimsfs.options import keeper_order, load_options  # noqa: PLC0415

        options = load_options({}, configs=self.configs, environment=environment).resolved(self.mountpoint)
        return keeper_order(self.mountpoint, options, foreground=foreground)


def complete_mount(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a declared mount, a mount point, or a path."""
    declared, _ = declared_mounts(context.params.get("directory") or DIRECTORY)
    names = [CompletionItem(mount.name) for mount in declared if mount.name.startswith(incomplete)]
    return names + complete_mounted(context, parameter, incomplete)


def declared_mounts(directory: Path) -> tuple[list[NamedMount], list[ConfigurationError]]:
    """The declared mounts, sorted by name, and the errors of invalid files."""
    mounts, problems = [], []
    for file in sorted(directory.glob("*.toml")):
        try:
            mounts.append(_read(file))
        except ConfigurationError as error:
            problems.append(error)
    return mounts, problems


def _read(file: Path) -> NamedMount:
    if not _NAME.fullmatch(file.stem):
        raise ConfigurationError(f"{file}: a mount's name has letters, digits, '_', '-' and '.': rename the file")
    from trimsfs.options import declared_mountpoint  # noqa: PLC0415

    return NamedMount(file.stem, canonical(declared_mountpoint(file)), file)


def find_mount(name: str, directory: Path, *, exact: bool = False) -> NamedMount:
    """Find a mount by its name or by a path, which has a slash or begins with a dot. Raises ConfigurationError.

    The path is the mount point or, unless *exact*, any path on the mount.
    """
    mounts, _ = declared_mounts(directory)
    if "/" in name or name.startswith("."):
        mountpoint = canonical(Path(name)) if exact else named_mountpoint(Path(name))
        matching = (mount for mount in mounts if mount.mountpoint == mountpoint)
        return next(matching, NamedMount(str(mountpoint), mountpoint))
    file = directory / f"{name}.toml"
    if not file.exists() and trimsfs_at(canonical(Path(name))) is not None:
        return find_mount(f"./{name}", directory, exact=exact)
    if not _NAME.fullmatch(name) or not file.exists():
        known = ", ".join(mount.name for mount in mounts) or "none"
        raise ConfigurationError(f"{name}: no such mount is declared in {directory} (known: {known})")
    return _read(file)
