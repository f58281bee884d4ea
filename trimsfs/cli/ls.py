"""``trimsfs ls``: the models of mounts, with their sizes, what of them is in which tier, and who uses them."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from trimsfs.cli.control_files import (
    control_directory,
    read_json,
    translated,
)
from trimsfs.cli.gpu import devices
from trimsfs.cli.output import reported, say
from trimsfs.client.xattrs import read_attribute
from trimsfs.errors import TrimsError
from trimsfs.mountinfo import file_systems, mount_of
from trimsfs.text import printable

PIPE_WIDTH = 1000


@dataclass(slots=True)
class _Row:
    """A model: a directory with files, or a single file. Sizes in bytes, ``gpu`` by device."""

    files: int = 0
    size: int = 0
    disk: int = 0
    host: int = 0
    gpu: dict[str, int] = field(default_factory=dict)
    open: int = 0
    pinned: int = 0


@click.command()
@click.argument("path", type=Path, required=False)
@click.option("--files", is_flag=True, help="One line for each file instead of each directory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def ls(path: Path | None, files: bool, as_json: bool) -> None:
    """List the models below PATH (default: of all mounts): sizes, what is on disk, in memory and on GPUs, and how many
    files are open or pinned."""
    rows: dict[str, _Row] = {}
    has_device = False
    if path is not None:
        rows, has_device = _rows(path, files)
    for mount in file_systems() if path is None else []:
        try:
            found, device_there = _rows(mount.mountpoint, files)
            rows, has_device = rows | found, has_device or device_there
        except TrimsError as error:
            say(f"trimsfs: left out: {error}", error=True)
    if as_json:
        fields = _Row.__dataclass_fields__
        models = [{"path": name} | {field: getattr(row, field) for field in fields} for name, row in rows.items()]
        click.echo(json.dumps(models, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("MODEL", overflow="fold")
    gpu = ["GPU"] if has_device else []
    for heading in ("FILES", "SIZE", "DISK", "HOST", *gpu, "OPEN", "PINNED"):
        table.add_column(heading, justify="right")
    for name, row in sorted(rows.items()):
        table.add_row(
            escape(printable(name)),
            str(row.files),
            decimal(row.size),
            _share(row.disk, row.size),
            _share(row.host, row.size),
            *[_bytes(sum(row.gpu.values())) for _ in gpu],
            str(row.open or ""),
            "yes" if row.pinned == row.files else f"{row.pinned} files" if row.pinned else "",
        )
    # Output to a pipe is not folded to a terminal's width.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def _rows(root: Path, by_file: bool) -> tuple[dict[str, _Row], bool]:
    """The models below a path by their names, and whether their mount has a GPU."""
    directory = control_directory(root)
    info = read_json(directory / "info")
    root = Path(os.path.realpath(root))
    here: dict[str, list[dict[str, Any]]] = {}
    for model in info.get("models", [info]):
        here.setdefault(model["path"], []).append(model)
    mount = mount_of(root)
    rows: dict[str, _Row] = {}
    for file, size in _walk(root):
        key = info["path"] + str(file.relative_to(root)) if "models" in info else info["path"]
        alone = by_file or (mount is not None and file.parent == mount.mountpoint)
        row = rows.setdefault(str(file if alone else file.parent), _Row())
        row.files += 1
        row.size += size
        model = _current(file, here.get(key, [])) if "models" in info else info
        if model is not None:
            row.disk += model["residency"]["disk"]
            row.host += model["residency"]["host"] or 0
            row.open += model["open"]
            row.pinned += model["pinned"]
            for device, size_there in model["residency"].get("gpu", {}).items():
                row.gpu[device] = row.gpu.get(device, 0) + size_there
    return rows, bool(devices(directory))


def _current(file: Path, models: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The cached model that is the current generation of a file; others have been replaced in the store."""
    if not models:
        return None
    try:
        generation = read_attribute(file, "generation")
    except OSError as error:
        raise translated(error, file) from error
    return next((model for model in models if model["generation"] == generation), None)


def _walk(root: Path, *, below: bool = False) -> Iterator[tuple[Path, int]]:
    """The files below a path and their sizes, without directories *below* it that the caller may not list."""
    try:
        if root.is_file():
            yield root, root.stat().st_size
            return
        with os.scandir(root) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), below=True)
            else:
                yield Path(entry.path), entry.stat(follow_symlinks=False).st_size
    except OSError as error:
        if below and isinstance(error, PermissionError):
            return
        raise translated(error, root) from error


def _share(part: int, whole: int) -> str:
    if whole == 0 or part == 0:
        return "-"
    return f"{min(part / whole, 1):.0%}"


def _bytes(number: int) -> str:
    # Bytes, not a percentage: several devices and users can each have a copy, or one of some tensors.
    return decimal(number) if number else "-"
