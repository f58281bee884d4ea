"""``trimsfs ls``: lists models, with their size, their bytes in each tier, and how many files are open or pinned."""

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from trimsfs.cli.control_client import (
    CONTROL_NAME,
    ask_each,
    control_directory,
    mount_of_path,
    read_json,
    read_lines,
)
from trimsfs.cli.gpu import counted, devices
from trimsfs.cli.output import fail_if_any, left_out, reported, say, share, show
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import NoSuchEntryError, StoreAccessError
from trimsfs.mountinfo import Mount, file_systems, mount_of
from trimsfs.text import printable

PROBE_S = 1.0
"""How long after a refusal the server may need to learn whether the store refuses everything."""


@dataclass(slots=True)
class Row:
    """A model: a directory with files, or a single file. Sizes in bytes, ``gpu`` by device."""

    files: int = 0
    size: int = 0
    disk: int = 0
    host: int = 0
    gpu: dict[str, int] = field(default_factory=dict)
    open: int = 0
    pinned: int = 0
    quarantined: int = 0

    def add(self, other: "Row") -> None:
        """Add the counts of another row."""
        for name in ("files", "size", "disk", "host", "open", "pinned", "quarantined"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for device, size in other.gpu.items():
            self.gpu[device] = self.gpu.get(device, 0) + size


@click.command(epilog=examples("trimsfs ls", "trimsfs ls --files /models/llama"))
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=Path, shell_complete=complete_mounted)
@click.option(
    "--mount",
    "named",
    type=Path,
    shell_complete=complete_mounted,
    metavar="MOUNT",
    help="Take PATH, and print paths, relative to this mount.",
)
@click.option("-r", "--recursive", "lines", flag_value="directories", help="One line for each directory.")
@click.option("--files", "lines", flag_value="files", help="One line for each file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def ls(paths: tuple[Path, ...], named: Path | None, lines: str | None, as_json: bool) -> None:
    """List models: sizes, tiers, open and pinned files.

    Lists the models below PATH, or of all mounts, and how much of each is on disk, in memory and on GPUs. Each
    directory in PATH is one model, with everything below it.

    DISK is the share that is in the cache directory. HOST is the share that is in memory, in the kernel's page cache.
    HOST below 100 % with DISK at 100 %: the kernel has dropped pages, or not read them since a restart of the host.
    Programs get them from the disk. OPEN counts open files, not programs; `trimsfs top` names those. Names come from
    the last listing: `trimsfs refresh` shows new ones at once.
    """
    rows: dict[str, Row] = {}
    has_device = False
    failures: list[tuple[str, str]] = []
    base = mount_of_path(named).mountpoint if named is not None else None
    if base is not None:
        paths = tuple(base / str(path).lstrip("/") for path in paths or ("",))
    listings = [rows_below(path, lines) for path in paths]
    if not paths:
        answers = ask_each(file_systems(), lambda mount: rows_below(mount.mountpoint, lines))
        listings = [answer for _, answer in left_out(answers, failures)]
    for each in listings:
        rows, has_device = rows | each.rows, has_device or each.has_device
        if each.refuses is not None:
            failures.append((StoreAccessError.__name__, f"{each.not_listed}: the store refuses: {each.refuses}"))
        elif each.not_listed is not None:
            say(f"trimsfs: {each.not_listed}: {each.refused}", error=True)
    if base is not None:
        rows = {os.path.relpath(name, base): row for name, row in rows.items()}
    if as_json:
        fields = Row.__dataclass_fields__
        models = [{"path": name} | {field: getattr(row, field) for field in fields} for name, row in rows.items()]
        click.echo(json.dumps(models, indent=2))
    else:
        _print(rows, has_device)
    fail_if_any(failures)


def _print(rows: dict[str, Row], has_device: bool) -> None:
    """Show rows as a table, with their total below."""
    gpu = ["GPU"] if has_device else []
    total = Row()
    for row in rows.values():
        total.add(row)
    damaged = [""] if total.quarantined else []
    table = [("MODEL", "FILES", "SIZE", "DISK", "HOST", *gpu, "OPEN", "PINNED", *damaged)]
    for name, row in [*sorted(rows.items()), *([("total", total)] if len(rows) > 1 else [])]:
        table.append(
            (
                printable(name),
                str(row.files),
                decimal(row.size),
                share(row.disk, row.size),
                share(row.host, row.size),
                # Bytes, not a percentage: several devices and users can each have a copy, or one of some tensors.
                *[decimal(sum(row.gpu.values())) if any(row.gpu.values()) else "-" for _ in gpu],
                str(row.open or ""),
                "yes" if row.pinned == row.files else counted(row.pinned, "file") if row.pinned else "",
                *[f"{row.quarantined} in quarantine" if row.quarantined else "" for _ in damaged],
            )
        )
    show(table, left=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Below:
    """The models below a path by their names, and whether their mount has a GPU.

    *not_listed* tells how many directories the store has refused to list, and *refused* why it refused the first.
    *refuses* tells why it refuses everything. Each is None without such a refusal.
    """

    rows: dict[str, Row]
    has_device: bool
    not_listed: str | None = None
    refused: str | None = None
    refuses: str | None = None


def rows_below(path: Path, lines: str | None) -> Below:
    """The models below a path. Raises TrimsError."""
    directory = control_directory(path)
    root = os.path.realpath(path)
    rows: dict[str, Row] = {}
    if directory.name != CONTROL_NAME:
        info = read_json(directory / "info")
        rows[root] = _row(info["size"], info)
        return Below(rows=rows, has_device=bool(devices(directory)))
    mount = mount_of(Path(root))
    alone = mount is not None and str(mount.mountpoint) == root
    prefix: str | None = None
    refused = list[str]()
    for record in read_lines(directory / "files", about=path):
        prefix = record["path"] if prefix is None else prefix
        below = record["path"][len(prefix) :].rstrip("/")
        here = record["here"]
        refused += [record["refused"]] if "refused" in record else []
        shown = _shown(root, below, lines, alone=alone)
        for name, size in record["files"].items():
            row = _row(size, here.get(name))
            rows.setdefault(shown or os.path.join(root, below, name), Row()).add(row)
    listing = Below(rows=rows, has_device=bool(devices(directory)))
    if not refused or mount is None:
        return listing
    directories = "1 directory" if len(refused) == 1 else f"{len(refused)} directories"
    not_listed = f"{path}: {directories} not listed"
    try:
        refuses = _refuses(mount)
    except NoSuchEntryError:  # a bind mount of a directory, which has no facts about the store
        refuses = refused[0]
    return replace(listing, not_listed=not_listed, refused=refused[0], refuses=refuses)


def _refuses(mount: Mount) -> str | None:
    """Why the store of a mount refuses everything; None if it refuses some directories only. Raises TrimsError."""
    until = time.monotonic() + PROBE_S
    while True:
        facts = read_json(mount.mountpoint / CONTROL_NAME / "control")
        if facts["store_refuses"]:
            return str(facts["store_problem"])
        if time.monotonic() > until:
            return None
        time.sleep(0.1)


def _shown(root: str, below: str, lines: str | None, *, alone: bool) -> str | None:
    """The row for the files of the directory *below* the root: their top directory or, by *lines*, their own.

    None if each file has its own row, as files at the top of a mount always do.
    """
    if lines == "files" or (alone and not below):
        return None
    return os.path.join(root, below if lines == "directories" else below.partition("/")[0]).rstrip("/")


def _row(size: int, here: dict[str, Any] | None) -> Row:
    """The row of one file; *here* says what this host has of it."""
    if here is None:
        return Row(files=1, size=size)
    residency = here["residency"]
    return Row(
        files=1,
        size=size,
        disk=residency["disk"],
        host=residency["host"] or 0,
        gpu=residency.get("gpu", {}),
        open=here["open"],
        pinned=int(here["pinned"]),
        quarantined=int(here["quarantined"]),
    )
