"""``trimsfs warm``, ``pin``, ``unpin``, ``evict`` and ``verify``: run commands of a mount, with a progress bar."""

import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from trimsfs.cli.control_files import control_directory, mount_of_path, read_lines
from trimsfs.cli.gpu import VERIFY_GPU, Naming, counted, verifying, warming
from trimsfs.cli.output import fail, reported, say
from trimsfs.errors import CacheFullError, TrimsError
from trimsfs.processes import usage
from trimsfs.text import printable

_paths = click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=Path)


@click.command()
@_paths
@click.option(
    "--to",
    "tier",
    metavar="disk|host|gpu[:UUID][.ipc]",
    default="host",
    show_default=True,
    help="The tier: the cache directory, the host's memory as well, or a GPU, by UUID where there are several; "
    ".ipc for programs that open copies by CUDA IPC.",
)
@click.option(
    "--for-uid",
    "uid",
    type=click.IntRange(0, (1 << 32) - 2),
    metavar="N",
    help="The user whose programs share the copy on the GPU. Default: the user who gives the command.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@reported
def warm(paths: tuple[Path, ...], tier: str, uid: int | None, quiet: bool) -> None:
    """Fetch models before they are needed; a directory means all files below it, for a GPU only the models."""
    _command(warming(tier, uid), paths, "warming", quiet)


@click.command()
@_paths
@click.option("--best-effort", is_flag=True, help="Exit 0 also when models are not locked in memory.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@reported
def pin(paths: tuple[Path, ...], best_effort: bool, quiet: bool) -> None:
    """Fetch models to disk, lock them in memory and never evict them, until `trimsfs unpin`.

    Models that the host does not let the server lock are pinned on disk alone; the exit code is 9 then.
    """
    _command(lambda _: "pin", paths, "pinning", quiet, best_effort=best_effort)


@click.command()
@_paths
@reported
def unpin(paths: tuple[Path, ...]) -> None:
    """Allow eviction of pinned models again."""
    _command(lambda _: "unpin", paths, "unpinning", quiet=True)


@click.command()
@_paths
@reported
def evict(paths: tuple[Path, ...]) -> None:
    """Remove models from the disk tier and from GPUs; refuses those that are open, pinned or in use."""
    _command(lambda _: "evict", paths, "evicting", quiet=True)


@click.command()
@_paths
@click.option(
    "--tier",
    type=click.Choice(["disk", "gpu"]),
    default="disk",
    show_default=True,
    help="Which copies: those in the cache, or those on GPUs.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@reported
def verify(paths: tuple[Path, ...], tier: str, quiet: bool) -> None:
    """Check local copies of models; a directory means all files below it.

    In the cache, trimsfs compares every chunk with its checksum and complete models with the store's digest, and
    refetches what differs. On GPUs, it compares copies with the files, byte by byte; a copy that differs is leased to
    no program again.
    """
    _command(verifying if tier == "gpu" else lambda _: "verify", paths, "verifying", quiet)


def _command(naming: Naming, paths: tuple[Path, ...], verb: str, quiet: bool, *, best_effort: bool = False) -> None:
    """Give a command for each path, and exit with the code of the first failure after all."""
    failures: list[tuple[str, str]] = []
    told: list[str] = []
    files: dict[Path, Path] = {}
    for path in paths:
        try:
            directory = control_directory(path)
            files[path] = directory / naming(directory)
        except TrimsError as error:
            failures.append((type(error).__name__, str(error)))
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not files or not console.is_terminal) as progress:
        for path, file in files.items():
            line = None
            task = progress.add_task(printable(f"{verb} {path}"), total=None)
            try:
                for line in read_lines(file):
                    progress.update(task, completed=line["done_bytes"], total=line["total_bytes"] or None)
            except TrimsError as error:
                failures.append((type(error).__name__, str(error)))
                continue
            if line is None or line["state"] == "running":
                failures.append(("", f"{path}: the command ended without a result: see the log of the mount"))
            elif line["state"] == "failed":
                failures.append((line["kind"], line["error"] + _users(path, line) + _extent(line)))
            else:
                progress.update(task, total=line["total_bytes"], completed=line["total_bytes"])
                told += _notes(file.name, path, line)
                hindrance = _unlocked(path, line)
                told += hindrance if best_effort else []
                failures += [] if best_effort else [(CacheFullError.__name__, each) for each in hindrance]
    for note in told:
        say(note)
    for _, message in failures[1:]:
        say(f"trimsfs: {message}", error=True)
    if failures:
        fail(*failures[0])


def _notes(command: str, path: Path, line: dict[str, Any]) -> list[str]:
    """The messages of a command that has succeeded."""
    notes = []
    if command == VERIFY_GPU and "compared_copies" in line:  # absent from a server of an earlier version
        notes.append(f"{path}: {counted(line['compared_copies'], 'copy')} compared, no difference")
    if line.get("left_out_files"):
        notes.append(
            f"{path}: left out {line['left_out_files']} of {line['total_files']} files of unknown format: name one "
            "to load it anyway"
        )
    return notes


def _unlocked(path: Path, line: dict[str, Any]) -> list[str]:
    """The message of a command that has pinned models and could not lock them in memory."""
    if not line.get("unlocked_files"):
        return []
    extent = f"{line['unlocked_files']} of {line['total_files']} files"
    return [f"{path}: pinned on disk, not locked in memory ({extent}): {line['unlocked']}; --best-effort exits 0"]


def _users(path: Path, line: dict[str, Any]) -> str:
    """By whom the file is used that a command cannot do anything about."""
    if not line.get("in_use"):
        return ""
    mount = mount_of_path(path)
    try:
        file = mount.mountpoint / os.path.relpath(f"/{line['in_use']}", mount.root)
        return f" (used {usage(mount.device, file.stat().st_ino)})"
    except OSError:
        return ""  # the store does not have it any more


def _extent(line: dict[str, Any]) -> str:
    """How many files of a command for a directory have failed."""
    if line["total_files"] <= 1:
        return ""
    return f" ({line['failed_files']} of {line['total_files']} files failed, the others are done)"
