"""``trimsfs warm``, ``pin``, ``unpin``, ``evict`` and ``verify``: run a command of a mount and show its progress."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Column

from trimsfs.cli.control_client import control_directory, mount_of_path, path_of_key, read_json, read_lines
from trimsfs.cli.gpu import VERIFY_GPU, Naming, counted, verifying, warming
from trimsfs.cli.output import fail_if_any, reported, say
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import CacheFullError, ConfigurationError, TrimsError
from trimsfs.processes import usage
from trimsfs.text import printable

BACKGROUND = "background-"
WARM_FLEET = "warm-fleet"

_paths = click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=Path, shell_complete=complete_mounted)
_background = click.option(
    "--background", is_flag=True, help="Return at once with the id of a job, which goes on: see `trimsfs jobs`."
)
_quiet = click.option("--quiet", is_flag=True, help="Show no progress bar and no success lines.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON: one line for each step.")


@click.command(
    epilog=examples(
        "trimsfs warm /models/llama",
        "trimsfs warm --background /models/llama /models/resnet50",
        "trimsfs warm --to gpu /models/llama",
        "trimsfs warm --fleet /models/llama",
    )
)
@_paths
@click.option("--fleet", "over_fleet", is_flag=True, help="Spread models over the fleet: each host fetches its share.")
@click.option(
    "--to",
    "tier",
    metavar="disk|host|gpu[:UUID][.ipc]",
    help="Where to load models: disk (the cache directory), host (also memory) or a GPU, by UUID if there are several; "
    ".ipc for programs that open copies by CUDA IPC. Default: host.",
)
@click.option(
    "--for-uid",
    "uid",
    type=click.IntRange(0, (1 << 32) - 2),
    metavar="N",
    help="The user whose programs share the copy on the GPU. Default: the user who runs the command.",
)
@_background
@_quiet
@_as_json
@reported
def warm(
    paths: tuple[Path, ...],
    over_fleet: bool,
    tier: str | None,
    uid: int | None,
    background: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fetch models before they are needed.

    A directory stands for all files below it; for a GPU, only for the models.

    Ctrl-C stops the fetch, unless another program also needs it.
    """
    if over_fleet and (tier is not None or uid is not None):
        raise ConfigurationError("option --fleet: spreads models over the disks of hosts: leave out --to and --for-uid")
    naming = _spreading if over_fleet else warming(tier or "host", uid)
    doing, done = ("spreading", "spread") if over_fleet else ("warming", "warmed")
    _give(naming, paths, _Manner(doing, done, quiet=quiet, as_json=as_json), background)


def _spreading(directory: Path) -> str:
    """The name of the command that spreads models over the fleet. Raises ConfigurationError on a mount without one."""
    if WARM_FLEET not in os.listdir(directory):
        mountpoint = mount_of_path(directory).mountpoint
        raise ConfigurationError(f"{mountpoint} belongs to no fleet now: see `trimsfs status` and the option fleet")
    return WARM_FLEET


@click.command(epilog=examples("trimsfs pin /models/llama"))
@_paths
@click.option("--best-effort", is_flag=True, help="Exit 0 even if models cannot be locked in memory.")
@_background
@_quiet
@_as_json
@reported
def pin(paths: tuple[Path, ...], best_effort: bool, background: bool, quiet: bool, as_json: bool) -> None:
    """Fetch models and keep them in memory and on disk.

    The server locks them in memory and does not evict them until `trimsfs unpin`.

    If the host forbids the lock, the server pins them on disk only, and the exit code is 9.
    """
    manner = _Manner("pinning", "pinned", quiet=quiet, as_json=as_json, best_effort=best_effort)
    _give(lambda _: "pin", paths, manner, background)


@click.command(epilog=examples("trimsfs unpin /models/llama"))
@_paths
@_as_json
@reported
def unpin(paths: tuple[Path, ...], as_json: bool) -> None:
    """Allow eviction of pinned models again."""
    _give(lambda _: "unpin", paths, _Manner("unpinning", "unpinned", bar=False, as_json=as_json))


@click.command(epilog=examples("trimsfs evict /models/llama"))
@_paths
@_as_json
@reported
def evict(paths: tuple[Path, ...], as_json: bool) -> None:
    """Remove local copies of models, on disk and on GPUs.

    Models that are open, pinned or in use stay; the exit code is then 12.
    """
    _give(lambda _: "evict", paths, _Manner("evicting", "evicted", bar=False, as_json=as_json))


@click.command(epilog=examples("trimsfs verify /models/llama", "trimsfs verify --tier gpu /models"))
@_paths
@click.option(
    "--tier",
    type=click.Choice(["disk", "gpu"]),
    default="disk",
    show_default=True,
    help="Which copies to check: those in the cache (disk) or on GPUs.",
)
@_quiet
@_as_json
@reported
def verify(paths: tuple[Path, ...], tier: str, quiet: bool, as_json: bool) -> None:
    """Check local copies of models, and repair them.

    A directory stands for all files below it.

    In the cache, trimsfs compares every chunk with its checksum and complete models with the store's digest, and
    refetches what differs. On GPUs, it compares copies with the files byte by byte, and never again leases a copy
    that differs.
    """
    manner = _Manner("verifying", "verified", quiet=quiet, as_json=as_json)
    _give(verifying if tier == "gpu" else lambda _: "verify", paths, manner)


def pin_before(paths: Sequence[Path]) -> None:
    """Pin models for a command that then uses them, and exit if that fails. Prints nothing else."""
    _give(lambda _: "pin", paths, _Manner("pinning", "pinned", quiet=True, best_effort=True, silent=True))


@dataclass(frozen=True, slots=True)
class _Manner:
    """How a command reports: its verb in the present and past tense, and what it shows.

    With *silent*, it prints no result.
    """

    doing: str
    done: str
    bar: bool = True
    quiet: bool = False
    as_json: bool = False
    best_effort: bool = False
    silent: bool = False


def _give(naming: Naming, paths: Sequence[Path], manner: _Manner, background: bool = False) -> None:
    """Run a command for each path; after all of them, exit with the code of the first failure."""
    failures: list[tuple[str, str]] = []
    carry_out = _start_jobs if background else _carry_out
    files: dict[Path, Path] = {}
    for path in paths:
        try:
            directory = control_directory(path)
            files[path] = directory / naming(directory)
        except TrimsError as error:
            failures.append(_failed(path, error, manner))
    fail_if_any([*failures, *carry_out(files, manner)])


def _failed(path: Path, error: TrimsError, manner: _Manner) -> tuple[str, str]:
    """Report a failed command as JSON if asked for; its error class and message."""
    kind = type(error).__name__
    if manner.as_json:
        click.echo(json.dumps({"path": str(path), "state": "failed", "error": str(error), "kind": kind}))
    return kind, str(error)


def _start_jobs(files: dict[Path, Path], manner: _Manner) -> list[tuple[str, str]]:
    """Start a job for each path; the failures."""
    failures = []
    for path, file in files.items():
        try:
            job = read_json(file.with_name(BACKGROUND + file.name))
            click.echo(json.dumps(job | {"path": str(path)}) if manner.as_json else job["id"])
        except TrimsError as error:
            failures.append(_failed(path, error, manner))
    return failures


def _carry_out(files: dict[Path, Path], manner: _Manner) -> list[tuple[str, str]]:
    """Run the command of each control file to its end; the failures."""
    failures = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    waiting = TextColumn("{task.fields[waiting]}", markup=False, table_column=Column(no_wrap=True))
    console = Console(stderr=True)
    bar = manner.bar and not manner.quiet and not manner.as_json and bool(files)
    bar = bar and console.is_terminal and sys.stdout.isatty()
    with Progress(*columns, waiting, console=console, disable=not bar) as progress:
        for path, file in files.items():
            task = progress.add_task(printable(f"{manner.doing} {path}"), total=None, waiting="")
            try:
                last = _last_line(path, file, manner, progress, task)
            except TrimsError as error:
                failures.append(_failed(path, error, manner))
                continue
            failure = _failure(path, last, manner)
            if failure is not None:
                failures.append(failure)
                continue
            progress.update(task, total=last["total_bytes"], completed=last["total_bytes"])
            result = "; ".join(_result(file.name, last, manner))
            if result and not manner.as_json and not manner.silent:
                say(f"{path}: {result}")
    return failures


def _last_line(path: Path, file: Path, manner: _Manner, progress: Progress, task: TaskID) -> dict[str, Any]:
    """Show the progress of the command for a path; its last line, which has the result."""
    line: dict[str, Any] = {"state": "running"}
    waits = False
    for line in read_lines(file, again=True):
        if manner.as_json:
            click.echo(json.dumps(line | {"path": str(path)}))
        reason, size = line["waiting"] or "", line["total_bytes"] or None
        progress.update(task, completed=line["done_bytes"], total=size, waiting=printable(reason))
        says = progress.disable and not manner.quiet and not manner.as_json
        if says and bool(reason) != waits and line["state"] == "running":
            waits = bool(reason)
            say(f"trimsfs: {path}: {reason or 'the store answers again'}", error=True)
    return line


def _failure(path: Path, line: dict[str, Any], manner: _Manner) -> tuple[str, str] | None:
    """The error class and message of a command that failed; None if it succeeded."""
    if line["state"] == "failed":
        return line["kind"], _error(path, line) + _users(path, line) + _extent(line)
    if line["state"] != "done":
        return "", f"{path}: the command ended without a result: see the log of the mount"
    if line["unlocked_files"] and not manner.best_effort:
        return CacheFullError.__name__, f"{path}: {_unlocked(line)}"
    return None


def _result(command: str, line: dict[str, Any], manner: _Manner) -> list[str]:
    """What to print about a command that succeeded."""
    left_out, absent = line["left_out_files"], line["absent_files"]
    parts = []
    if command == VERIFY_GPU:
        parts.append(f"{counted(line['compared_copies'], 'copy')} compared, no difference")
    elif not manner.quiet:
        size = f", {decimal(line['total_bytes'] - line['absent_bytes'])}" if manner.bar else ""
        parts.append(f"{manner.done} {counted(line['total_files'] - left_out - absent, 'file')}{size}")
        if absent:
            parts.append(f"skipped {counted(absent, 'other file')} that this host does not have")
    if left_out:
        parts.append(
            f"left out {left_out} of {line['total_files']} files of unknown format: name one to load it anyway"
        )
    if line["unlocked_files"]:
        parts.append(_unlocked(line))
    return parts


def _error(path: Path, line: dict[str, Any]) -> str:
    """The error of a command, with the path of the file on this host instead of its key."""
    key, error = line["failed"], str(line["error"])
    if key is None or not error.startswith(key):
        return error
    rest = re.sub(r"^ at (\d+)(?=:)", r", from byte \1 on", error.removeprefix(key))
    return f"{path_of_key(path, key)}{rest}"


def _unlocked(line: dict[str, Any]) -> str:
    """The message about models that are pinned on disk but not locked in memory."""
    extent = f"{line['unlocked_files']} of {line['total_files']} files"
    return (
        f"pinned on disk, not locked in memory ({extent}): {line['unlocked']}; then mount "
        "again, which locks them; --best-effort exits 0"
    )


def _extent(line: dict[str, Any]) -> str:
    """How many files of a directory failed, for an error message."""
    if line["total_files"] <= 1:
        return ""
    if line["failed_files"] == line["total_files"]:
        return f" (all {line['total_files']} files failed)"
    return f" ({line['failed_files']} of {line['total_files']} files failed, the others are done)"


def _users(path: Path, line: dict[str, Any]) -> str:
    """Who uses the file that blocks a command, for an error message."""
    if not line.get("in_use"):
        return ""
    mount, file = mount_of_path(path), path_of_key(path, line["in_use"])
    try:
        return f" (used {usage(mount.device, file.stat().st_ino)})"
    except OSError:
        return ""  # the store no longer has it
