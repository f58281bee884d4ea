"""``trimsfs status``: the mounts of this host, with their servers, caches, requests and GPUs."""

import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from trimsfs.cli.control_client import ask_each, check_answers, mount_over, read_json, read_text
from trimsfs.cli.control_reader import PROBLEMS
from trimsfs.cli.gpu import add_details, counted, has_failed, lines
from trimsfs.cli.output import reported, say
from trimsfs.command_group import complete_mounted, examples
from trimsfs.control.metrics import parse
from trimsfs.errors import NotPermittedError, StoreAccessError, TrimsError
from trimsfs.exit_codes import exit_code
from trimsfs.mountinfo import Mount, file_systems
from trimsfs.options import FLEET_DIRECTORY

DEGRADED, NOT_ANSWERING = 1, 2
"""Exit codes."""
MOST_NAMED = 5
"""Most files in quarantine that are named."""


@click.command(epilog=examples("trimsfs status", "trimsfs status --json /models"))
@click.argument("mountpoint", type=Path, shell_complete=complete_mounted, required=False)
@click.option("--gpu", "with_copies", is_flag=True, help="Show the copies on GPUs, and who uses them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
def status(mountpoint: Path | None, with_copies: bool, as_json: bool) -> None:
    """Show whether mounts work.

    Shows all mounts of this host, or the one that MOUNTPOINT lies on.

    Exits 0 if all mounts work. Exits 1 if one serves without its keeper, its store, its fleet, its cache or a GPU, or
    has a file in quarantine. Exits 2 if one does not answer. Exits 11 if MOUNTPOINT is another user's, who hides it.
    Members of a fleet that fail do not count.
    """
    chosen = [mount_over(mountpoint)] if mountpoint is not None else file_systems()
    answers = dict(ask_each(chosen, partial(_facts, copies=with_copies or as_json)))
    all_facts = [_shown(mount, answers[mount]) for mount in chosen]
    if as_json:
        click.echo(json.dumps(all_facts, indent=2))
    else:
        if not all_facts:
            click.echo("no trimsfs mounts")
        for facts in all_facts:
            _show(facts)
    # Another user's mount that denies access is no failure, unless it was named.
    answered = [facts for facts in all_facts if mountpoint is not None or not _is_hidden(facts)]
    sys.exit(max(map(_exit_code, answered), default=0))


def _facts(mount: Mount, *, copies: bool) -> dict[str, Any]:
    """The facts and metrics of a mount, read from its control files. Raises TrimsError."""
    check_answers(mount.mountpoint)
    try:
        facts = read_json(mount.mountpoint / ".trims/control")
    except StoreAccessError:  # by the modes of the mount: no store is asked for its facts
        raise NotPermittedError(f"{mount.mountpoint}: Permission denied: it is another user's mount") from None
    metrics = read_text(mount.mountpoint / ".trims/metrics")
    facts["metrics"] = parse(metrics)
    if facts.get("fleet"):
        facts["fleet"]["drained"] = str(mount.mountpoint) in _drained()
    if "gpu" in facts:
        add_details(facts["gpu"], metrics, mount.mountpoint, copies=copies)
    return facts


def _drained() -> list[str]:
    """The mount points that `mountctl fleet drain` has drained."""
    with suppress(OSError):
        return (FLEET_DIRECTORY / "drained").read_text().splitlines()
    return []


def _shown(mount: Mount, answer: dict[str, Any] | TrimsError) -> dict[str, Any]:
    if isinstance(answer, TrimsError):
        return {
            "mountpoint": str(mount.mountpoint),
            "store": mount.source,
            "error": str(answer),
            "kind": type(answer).__name__,
        }
    return answer


def _processes(counts: dict[str, int]) -> str:
    """The processes of a mount, as ``6: keeper, server, 2 fetch``."""
    kinds = [role if count == 1 else f"{count} {role}" for role, count in counts.items()]
    return f"{sum(counts.values())}: {', '.join(kinds)}"


def _without_store(*, refuses: bool) -> str:
    """What a store does that serves nothing new."""
    return f"{'refuses' if refuses else 'does not answer'}, serving from the cache"


def _told_of_cache(facts: dict[str, Any], used: int, budget: int) -> str:
    """How many bytes are used of the budget, and whether its file system has as many; or why none is used."""
    if facts["cache_problem"]:
        return f"not used: {facts['cache_problem']}"
    limit = f" of {decimal(budget)}" if budget else ""
    disk = facts["cache_disk_bytes"] or budget
    limit += f" (its file system has {decimal(disk)})" if disk < budget else ""
    return f"{decimal(used)}{limit} in {facts['cache_dir']}"


def _told_of_quarantine(facts: dict[str, Any]) -> str:
    """How many files are in quarantine, and the paths of the first."""
    named = [str(Path(facts["mountpoint"]) / path) for path in facts["quarantine"]]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f"{counted(len(named), 'file')}: {', '.join(named[:MOST_NAMED])}{more}"


def _told_of_store(facts: dict[str, Any]) -> str:
    """The line about one of several stores."""
    if facts["problem"]:
        state = f"{_without_store(refuses=facts['refuses'])}: {facts['problem']}"
    else:
        state = f"{facts['requests']} requests, {facts['failed_attempts']} attempts failed"
    tenant = f", tenant {facts['tenant']}" if facts["tenant"] is not None else ""
    return f"/{facts['path']}: {facts['store']}{tenant}: {state}"


def told_of_fleet(facts: dict[str, Any], sent_bytes: int) -> list[str]:
    """The lines about a fleet: one, and one more for each member with a problem."""
    members = facts["members"]
    received = sum(member["received_bytes"] for member in members)
    state = f"{decimal(received)} from others, {decimal(sent_bytes)} sent"
    if not facts["on"]:
        state = "off: turn it on by `trimsfs fleet on`"
    elif facts["drained"]:
        state += "; drained: `mountctl fleet undrain`"
    elif facts["me"] is None:
        state += "; this host is not among them"
    failing = [
        f"{member['address']}: {member['problem'] or 'sent wrong bytes'}"
        + (f", {member['strikes']} strikes" if member["strikes"] else "")
        for member in members
        if member["problem"] or member["strikes"]
    ]
    if facts["problem"]:
        failing.insert(0, f"members not read: {facts['problem']}: see fleet_members")
    return [f"{facts['name']}, {counted(len(members), 'member')}: {state}", *failing]


def _is_hidden(facts: dict[str, Any]) -> bool:
    """Whether another user's mount denies access: it may be well."""
    return facts.get("kind") == NotPermittedError.__name__


def _exit_code(facts: dict[str, Any]) -> int:
    if "error" in facts:
        return exit_code(facts["kind"]) if _is_hidden(facts) else NOT_ANSWERING
    has_problem = any(facts.get(f"{what}_problem") for what in PROBLEMS)
    return DEGRADED if has_problem or has_failed(facts.get("gpu")) else 0


def _show_kernel(facts: dict[str, Any]) -> None:
    """Say why no file is passed through, if so, and what the kernel lacks, with what it costs."""
    if not facts["passthrough"]["used"]:
        say(f"  passthrough not used: {facts['passthrough']['reason']}: files are served in cached mode")
    kernel = facts.get("kernel", {"lacks": ()})  # earlier versions tell none
    for index, lack in enumerate(kernel["lacks"]):
        say(f"  {'' if index else 'kernel':<11} Linux {kernel['release']} has {lack}")


def _show(facts: dict[str, Any]) -> None:
    say(f"{facts['mountpoint']}: {facts['store']}")
    if "error" in facts:
        say(f"  {'hidden from this user' if _is_hidden(facts) else 'not answering'}: {facts['error']}")
        return
    metrics = facts["metrics"]

    def number(name: str) -> int:
        return int(metrics.get(f"trimsfs_{name}", 0))

    keeper = "no keeper" if facts["keeper_pid"] is None else f"keeper pid {facts['keeper_pid']}"
    say(f"  server      pid {facts['server_pid']}, {keeper}, version {facts['version']}")
    if facts["keeper_problem"]:
        say(f"  keeper      {facts['keeper_problem']}")
    _show_kernel(facts)
    of_server = "the server has {open} descriptors open of at most {limit}".format(**facts["descriptors"])
    say(f"  processes   {_processes(facts['processes'])}; {of_server}")
    say(f"  cache       {_told_of_cache(facts, number('disk_used_bytes'), number('disk_budget_bytes'))}")
    if facts["quarantine"]:
        say(f"  quarantine  {_told_of_quarantine(facts)}")
    say(
        f"  fetched     {decimal(number('fetch_fetched_bytes_total'))}, "
        f"{number('fetch_in_flight')} requests in flight of at most {number('fetch_request_limit')}"
    )
    if facts.get("stores"):
        for index, each in enumerate(facts["stores"]):
            say(f"  {'' if index else 'stores':<11} {_told_of_store(each)}")
    elif facts["store_problem"]:
        say(f"  store       {_without_store(refuses=facts['store_refuses'])}: {facts['store_problem']}")
    else:
        say(
            f"  store       {number('store_requests_total')} requests, "
            f"{number('store_failed_attempts_total')} attempts failed"
        )
    if facts["store_empty"]:
        say(f"  {'':<11} {facts['store_empty']}: there is nothing under it: check the spelling if you expect objects")
    fleet = told_of_fleet(facts["fleet"], number("fleet_served_sent_bytes_total")) if facts.get("fleet") else []
    if facts.get("fleet_problem"):
        fleet = [f"this host fetches alone: {facts['fleet_problem']}"]
    for index, line in enumerate(fleet):
        say(f"  {'' if index else 'fleet':<11} {line}")
    say(f"  open        {number('files_open_handles')} files")
    for index, line in enumerate(lines(facts["gpu"]) if "gpu" in facts else ()):
        say(f"  {'' if index else 'gpu':<11} {line}")
    say(f"  log         {facts['log_file'] or 'to standard error of its unit, container or terminal'}")
