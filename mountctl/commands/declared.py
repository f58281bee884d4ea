"""The mounts that this host declares, one TOML file each: a mount point, and any options of ``trimsfs mount``."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimsfs.configuration import DEFAULT_CONFIG, declared_mountpoint, keeper_order, load_options
from trimsfs.errors import ConfigurationError
from trimsfs.mountinfo import canonical

DIRECTORY = Path("/etc/trimsfs/mounts.d")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount by its name: that of its file, or for one that is not declared its mount point."""

    name: str
    mountpoint: Path
    file: Path | None = None

    @property
    def configs(self) -> list[Path]:
        """The configuration files of a declared mount, later ones winning."""
        assert self.file is not None
        return [*([DEFAULT_CONFIG] if DEFAULT_CONFIG.exists() else []), self.file]

    def command(self, *, foreground: bool = False) -> list[str]:
        """The command that mounts a declared mount."""
        options = [f"--config={file}" for file in self.configs] + ["--foreground"] * foreground
        return [sys.executable, "-m", "trimsfs", "mount", *options, str(self.mountpoint)]

    def order(self, *, foreground: bool) -> dict[str, Any]:
        """What the keeper of a declared mount is told. Raises ConfigurationError."""
        options = load_options({}, configs=self.configs).resolved(self.mountpoint)
        return keeper_order(self.mountpoint, options, foreground=foreground)


def declared(directory: Path) -> tuple[list[Mount], list[ConfigurationError]]:
    """The declared mounts, by name, and what is wrong with the files that cannot be used."""
    found, problems = [], []
    for file in sorted(directory.glob("*.toml")):
        try:
            found.append(_read(file))
        except ConfigurationError as error:
            problems.append(error)
    return found, problems


def _read(file: Path) -> Mount:
    if not _NAME.fullmatch(file.stem):
        raise ConfigurationError(f"{file}: a mount's name has letters, digits, '_', '-' and '.': rename the file")
    return Mount(file.stem, canonical(declared_mountpoint(file)), file)


def find(name: str, directory: Path) -> Mount:
    """A mount by its name, or by its mount point when that is an absolute path. Raises ConfigurationError."""
    mounts, _ = declared(directory)
    if name.startswith("/"):
        mountpoint = canonical(Path(name))
        return next((mount for mount in mounts if mount.mountpoint == mountpoint), Mount(name, mountpoint))
    file = directory / f"{name}.toml"
    if not _NAME.fullmatch(name) or not file.exists():
        known = ", ".join(mount.name for mount in mounts) or "none"
        raise ConfigurationError(f"{name}: no such mount is declared in {directory} (known: {known})")
    return _read(file)
