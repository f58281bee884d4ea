"""``trimsfs ls``: the models of mounts, with their sizes, what of them is in which tier, and who uses them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from trimsfs.cli.control_files import ask_each, control_directory, mount_of_path, read_json, translated
from trimsfs.cli.gpu import devices
from trimsfs.cli.output import fail_if_any, left_out, reported, show
from trimsfs.client.xattrs import read_attribute
from trimsfs.command_group import complete_mounted
from trimsfs.mountinfo import file_systems, mount_of
from trimsfs.text import printable


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

    def add(self, other: "_Row") -> None:
        """Count another as a part of this."""
        for name in ("files", "size", "disk", "host", "open", "pinned"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for device, size in other.gpu.items():
            self.gpu[device] = self.gpu.get(device, 0) + size


@click.command()
@click.argument("paths", metavar="[PATH]...", nargs=-1, type=Path, shell_complete=complete_mounted)
@click.option(
    "--mount",
    "named",
    type=Path,
    shell_complete=complete_mounted,
    metavar="MOUNT",
    help="PATH, and what is shown, is relative to this mount.",
)
@click.option("-r", "--recursive", "lines", flag_value="directories", help="One line for each directory.")
@click.option("--files", "lines", flag_value="files", help="One line for each file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def ls(paths: tuple[Path, ...], named: Path | None, lines: str | None, as_json: bool) -> None:
    """List the models below PATH (default: of all mounts): sizes, what is on disk, in memory and on GPUs, and how many
    files are open or pinned.

    Each directory in PATH is one model, with all that is below it.
    """
    rows: dict[str, _Row] = {}
    has_device = False
    failures: list[tuple[str, str]] = []
    base = mount_of_path(named).mountpoint if named is not None else None
    if base is not None:
        paths = tuple(base / str(path).lstrip("/") for path in paths or ("",))
    found = [_rows(path, lines) for path in paths]
    if not paths:
        answers = ask_each(file_systems(), lambda mount: _rows(mount.mountpoint, lines))
        found = [answer for _, answer in left_out(answers, failures)]
    for each, device_there in found:
        rows, has_device = rows | each, has_device or device_there
    if base is not None:
        rows = {os.path.relpath(name, base): row for name, row in rows.items()}
    if as_json:
        fields = _Row.__dataclass_fields__
        models = [{"path": name} | {field: getattr(row, field) for field in fields} for name, row in rows.items()]
        click.echo(json.dumps(models, indent=2))
    else:
        _print(rows, has_device)
    fail_if_any(failures)


def _print(rows: dict[str, _Row], has_device: bool) -> None:
    """Show rows as a table, with their total below."""
    table = Table(box=None, pad_edge=False)
    table.add_column("MODEL", overflow="fold")
    gpu = ["GPU"] if has_device else []
    for heading in ("FILES", "SIZE", "DISK", "HOST", *gpu, "OPEN", "PINNED"):
        table.add_column(heading, justify="right")
    total = _Row()
    for row in rows.values():
        total.add(row)
    for name, row in [*sorted(rows.items()), *([("total", total)] if len(rows) > 1 else [])]:
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
    show(table)


def _rows(root: Path, lines: str | None) -> tuple[dict[str, _Row], bool]:
    """The models below a path by their names, and whether their mount has a GPU."""
    directory = control_directory(root)
    root = Path(os.path.realpath(root))
    files = list(_walk(root))  # before the server is asked: it tells of the links that it has listed
    info = read_json(directory / "info")
    here: dict[str, list[dict[str, Any]]] = {}
    for model in info.get("models", [info]):
        here.setdefault(model["path"], []).append(model)
    mount = mount_of(root)
    rows: dict[str, _Row] = {}
    for file, size in files:
        key = info["path"] + str(file.relative_to(root)) if "models" in info else info["path"]
        row = _Row(files=1, size=size)
        model = _current(file, here.get(key, [])) if "models" in info else info
        if model is not None:
            row.disk = model["residency"]["disk"]
            row.host = model["residency"]["host"] or 0
            row.open = model["open"]
            row.pinned = int(model["pinned"])
            row.gpu = model["residency"].get("gpu", {})
        alone = mount is not None and file.parent == mount.mountpoint
        rows.setdefault(str(file if alone else _shown(file, root, lines)), _Row()).add(row)
    return rows, bool(devices(directory))


def _shown(file: Path, root: Path, lines: str | None) -> Path:
    """What a file is shown as a part of: a directory at the top or, as *lines* says, its own, or itself."""
    if lines == "files" or file == root:
        return file
    if lines == "directories" or file.parent == root:
        return file.parent
    return root / file.relative_to(root).parts[0]


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
                yield Path(entry.path), _size(entry)
    except OSError as error:
        if below and isinstance(error, PermissionError):
            return
        raise translated(error, root) from error


def _size(entry: "os.DirEntry[str]") -> int:
    """The size of a file; of one of which the store may not tell it, 0."""
    try:
        return entry.stat(follow_symlinks=False).st_size
    except PermissionError:
        return 0


def _share(part: int, whole: int) -> str:
    if whole == 0 or part == 0:
        return "-"
    return f"{min(part / whole, 1):.0%}"


def _bytes(number: int) -> str:
    # Bytes, not a percentage: several devices and users can each have a copy, or one of some tensors.
    return decimal(number) if number else "-"
