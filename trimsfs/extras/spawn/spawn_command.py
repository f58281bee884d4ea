"""``trimsfs spawn``: runs a Python program in a fork of a process that has imported its libraries already."""

import click

from trimsfs.cli.output import reported, say, show
from trimsfs.command_group import complete_path, examples
from trimsfs.errors import InvalidRequestError, NoSuchEntryError
from trimsfs.extras.spawn.direct import run
from trimsfs.extras.spawn.python_command import PlainError
from trimsfs.extras.spawn.servers import ANSWER_S, Directory, memory_of

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
@click.option("--list", "lists", is_flag=True, help="List your fork servers.")
@click.option("--stop", "stops", is_flag=True, help="End your fork servers: all, or those of PID. Programs go on.")
@click.argument("command", nargs=-1, metavar="[--] COMMAND...", type=click.UNPROCESSED)
@reported
def spawn(
    preloads: tuple[str, ...],
    models: tuple[str, ...],
    variables: tuple[str, ...],
    command: tuple[str, ...],
    *,
    lists: bool,
    stops: bool,
) -> None:
    """Run a Python program whose imports are there already.

    It runs in a fork of a process that has imported its libraries.

    COMMAND is what you would type without it: `python app.py`, `python -m package`, or a script that names Python in
    its first line. The program gets its arguments, environment, directory, descriptors, signals and limits, and ends
    with the same status. A program that cannot be forked runs as it is, and a line on standard error says why.
    """
    if lists or stops:
        try:
            directory = Directory()
        except PlainError as error:
            raise InvalidRequestError(str(error)) from error
        if stops:
            _stop(directory, command)
        else:
            _list(directory)
        return
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    run(
        command,
        preload=[name for each in preloads for name in each.split(",")],
        models=models,
        vary=[name for each in variables for name in each.split(",")],
    )
    return


def _list(directory: Directory) -> None:
    rows = [_HEADINGS]
    notes = []
    for key in directory.names():
        answer = directory.ask(key, "tell")
        if answer is None:
            directory.forget(key)
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


def _stop(directory: Directory, pids: tuple[str, ...]) -> None:
    stopped = set()
    for key in directory.names():
        answer = directory.ask(key, "tell")
        if answer is not None and (not pids or str(answer[0]) in pids):
            directory.ask(key, "stop")
            stopped.add(str(answer[0]))
    if missing := sorted(set(pids) - stopped):
        raise NoSuchEntryError(f"pid {missing[0]} is no fork server of yours: see trimsfs spawn --list")
