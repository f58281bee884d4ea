"""``trimsfs jobs``: lists and cancels the commands that servers run in the background."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from trimsfs.cli.control_client import check_answers, on_this_host, read_json, records_of
from trimsfs.cli.output import fail_if_any, reported, say, show
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import NoSuchEntryError, TrimsError
from trimsfs.mountinfo import Mount, file_systems
from trimsfs.text import printable

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


class _ListedByDefault(click.Group):
    """`jobs [PATH]` is `jobs list [PATH]`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["list", *args])


@click.group(
    cls=_ListedByDefault,
    subcommand_metavar="[PATH] | list [PATH] | cancel ID...",
    epilog=examples("trimsfs jobs", "trimsfs jobs list /models/llama", "trimsfs jobs cancel ID"),
)
def jobs() -> None:
    """List or cancel background jobs.

    A job survives a restart of its server, and waits while the store does not answer. Jobs that have ended stay listed
    for a while.
    """


@jobs.command(name="list", epilog=examples("trimsfs jobs list --json /models/llama"))
@click.argument("path", type=Path, shell_complete=complete_mounted, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def list_jobs(path: Path | None, as_json: bool) -> None:
    """List the jobs of all mounts, or those for PATH and everything below it."""
    failures: list[tuple[str, str]] = []
    jobs = records_of(path, jobs_of, failures)
    if as_json:
        click.echo(json.dumps(jobs, indent=2))
    elif jobs:
        _show(jobs)
    else:
        click.echo("no jobs")
    fail_if_any(failures)


def _show(jobs: list[dict[str, Any]]) -> None:
    rows = [("ID", "COMMAND", "PATH", "STATE", "DONE", "TOTAL", "AGE", "")]
    for job in jobs:
        about = (job["id"], job["command"], printable(job["path"]), job["state"])
        sizes = (decimal(job["done_bytes"]), decimal(job["total_bytes"]), _age(time.time() - job["began"]))
        reason = job.get("error") or job["waiting"] or job["unlocked"] or ""
        rows.append((*about, *sizes, printable(reason)))
    show(rows, left=4)


def jobs_of(mount: Mount) -> list[dict[str, Any]]:
    """The jobs of a mount, with their paths on this host."""
    check_answers(mount.mountpoint)
    try:
        records = read_json(mount.mountpoint / ".trims/.trims/jobs")["jobs"]
    except NoSuchEntryError:
        return []  # older servers have no jobs
    return on_this_host(mount, records)


def _age(seconds: float) -> str:
    unit, length = next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])
    return f"{max(0, seconds) // length:.0f}{unit}"


@jobs.command(epilog=examples("trimsfs jobs cancel ID"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@reported
def cancel(ids: tuple[str, ...]) -> None:
    """Cancel jobs; what they have fetched stays cached."""
    failures: list[tuple[str, str]] = []
    for number in ids:
        try:
            job = _cancelled(number)
            before = "" if job["state"] == "cancelled" else "had ended: "
            say(f"{number}: {before}{job['state']}")
        except TrimsError as error:
            failures.append((type(error).__name__, str(error)))
    fail_if_any(failures)


def _cancelled(number: str) -> dict[str, Any]:
    """Cancel a job of any mount of this host; its final state. Raises TrimsError."""
    silent: TrimsError | None = None
    for mount in file_systems() if number.isalnum() else []:
        try:
            check_answers(mount.mountpoint)
        except TrimsError as error:
            silent = silent or error
            continue
        with suppress(NoSuchEntryError):
            return read_json(mount.mountpoint / f".trims/.trims/cancel-{number}")
    if silent is not None:
        raise type(silent)(f"job {number}: no other mount has it: {silent}")
    raise NoSuchEntryError(f"no job {number}: see `trimsfs jobs`")
