"""``trimsfs spawn``: runs a Python program in a fork of a process that has imported its libraries already."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import click

from trimsfs.cli.output import reported, say, show
from trimsfs.command_group import complete_path, examples
from trimsfs.errors import InvalidRequestError, NoSuchEntryError
from trimsfs.extras.spawn.direct import run
from trimsfs.extras.spawn.fork_server.joining import ALLOWABLE
from trimsfs.extras.spawn.python_command import PlainError
from trimsfs.extras.spawn.servers import ANSWER_S, Directory, ask, memory_of
from trimsfs.extras.spawn.shared_server import become_server

Ask = Callable[[str], tuple[int, dict[str, Any]] | None]
"""Asks a server ``tell`` or ``stop``; its pid and its answer, None if it has ended."""
_HEADINGS = ("pid", "program", "running", "served", "idle", "modules", "memory")


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples(
        "trimsfs spawn -- python app.py",
        "trimsfs spawn --preload torch,transformers -- python app.py --prompt Hello",
        "trimsfs spawn --list",
    ),
)
@click.option(
    "--preload",
    "preloads",
    metavar="MODULE,...",
    multiple=True,
    help="Import these before the fork. Default: what earlier runs of the program imported.",
)
@click.option(
    "--model",
    "models",
    metavar="PATH",
    multiple=True,
    shell_complete=complete_path,
    help="Have the files of this model mapped and in memory before the fork.",
)
@click.option(
    "--vary",
    "variables",
    metavar="NAME,...",
    multiple=True,
    help="Share the fork server among callers whose environments differ in these variables; NAME* is a prefix.",
)
@click.option("--socket", metavar="SOCKET", default="", help="Have the fork server fork that listens at this socket.")
@click.option(
    "--serve",
    metavar="SOCKET",
    default="",
    help="Become a fork server of COMMAND, a Python interpreter, for callers at this socket, also in containers.",
)
@click.option(
    "--allow",
    "allowed",
    metavar="NAME,...",
    multiple=True,
    help=f"With --serve: fork although this may differ from the caller's: {', '.join(ALLOWABLE)}.",
)
@click.option("--list", "lists", is_flag=True, help="List your fork servers.")
@click.option("--stop", "stops", is_flag=True, help="End your fork servers: all, or those of PID. Programs go on.")
@click.argument("command", nargs=-1, metavar="[--] COMMAND...", type=click.UNPROCESSED)
@reported
def spawn(
    preloads: tuple[str, ...],
    models: tuple[str, ...],
    variables: tuple[str, ...],
    allowed: tuple[str, ...],
    command: tuple[str, ...],
    *,
    socket: str,
    serve: str,
    lists: bool,
    stops: bool,
) -> None:
    """Run a Python program whose imports are there already.

    It runs in a fork of a process that has imported its libraries.

    COMMAND is what you would type without it: `python app.py`, `python -m package`, or a script that names Python in
    its first line. The program gets its arguments, environment, directory, descriptors, signals and limits, and ends
    with the same status. A program that cannot be forked runs as it is, and a line on standard error says why.
    """
    preload, vary, allow = (
        [name for each in given for name in each.split(",")] for given in (preloads, variables, allowed)
    )
    if lists or stops:
        servers = _servers(socket)
        if stops:
            _stop(servers, command)
        else:
            _list(servers)
        if not socket:
            _clean()
        return
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    if serve:
        if unknown := set(allow) - set(ALLOWABLE):
            raise click.UsageError(f"--allow takes {', '.join(ALLOWABLE)}, not {min(unknown)}.")
        if not preload:
            raise click.UsageError("--serve needs --preload: what callers import is not learned.")
        try:
            become_server(serve, command, preload=preload, models=models, vary=vary, allow=allow)
        except PlainError as error:
            raise InvalidRequestError(str(error)) from error
    if allow:
        raise click.UsageError("--allow goes with --serve.")
    if socket and (preload or models or vary):
        raise click.UsageError("--preload, --model and --vary go with --serve.")
    run(command, preload=preload, models=models, vary=vary, socket=socket)


def _clean() -> None:
    """Remove the files of servers that have ended; those do no harm where they cannot be removed."""
    with suppress(PlainError, OSError):
        Directory().clean()


def _servers(socket: str) -> list[Ask]:
    """What asks each server of this user, or the one at a socket."""
    if socket:
        if ask(socket, "tell") is None:
            raise NoSuchEntryError(f"no fork server listens at {socket}, or not to this user")
        return [partial(ask, socket)]
    try:
        directory = Directory()
    except PlainError as error:
        raise InvalidRequestError(str(error)) from error
    return [partial(directory.ask, key) for key in directory.names()]


def _list(servers: list[Ask]) -> None:
    rows = [_HEADINGS]
    notes = []
    for asked in servers:
        if (answer := asked("tell")) is None:
            continue
        pid, facts = answer
        memory = f"{memory_of(pid) >> 20} MiB"
        if not facts:
            rows.append((str(pid), "-", "-", "-", "-", "-", memory))
            notes.append(f"pid {pid} has not answered for {ANSWER_S:.0f} s: it imports, or is stopped")
            continue
        numbers = (facts[name] for name in ("running", "served"))
        rows.append(
            (str(pid), facts["title"], *map(str, numbers), f"{facts['idle_s']} s", str(facts["modules"]), memory)
        )
        notes += [f"pid {pid}: {note}" for note in facts["left_out"]]
    show(rows, left=0)
    for note in notes:
        say(note)


def _stop(servers: list[Ask], pids: tuple[str, ...]) -> None:
    stopped = set()
    for asked in servers:
        answer = asked("tell")
        if answer is not None and (not pids or str(answer[0]) in pids):
            asked("stop")
            stopped.add(str(answer[0]))
    if missing := sorted(set(pids) - stopped):
        raise NoSuchEntryError(f"pid {missing[0]} is no fork server of yours: see trimsfs spawn --list")
