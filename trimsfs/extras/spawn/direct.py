"""``trimsfs spawn`` without the imports of the other commands, which would take longer than a fork."""

import os
from collections.abc import Sequence

from trimsfs.cli.direct_run import run_plain
from trimsfs.extras.spawn.python_command import PlainError
from trimsfs.extras.spawn.servers import say
from trimsfs.extras.spawn.session import spawn, spawn_at
from trimsfs.plugins import load

_OPTIONS = ("--preload", "--model", "--vary", "--socket")


def main(words: Sequence[str]) -> None:
    """Run what a command line says, and exit. Return if the full command must read it."""
    given: dict[str, list[str]] = {name: [] for name in _OPTIONS}
    rest = list(words)
    while rest and rest[0] != "--":
        name, _, value = rest.pop(0).partition("=")
        if name not in given or not (value or rest):
            return
        value = value or rest.pop(0)
        given[name] += [value] if name in {"--model", "--socket"} else value.split(",")
    sockets = given.pop("--socket")
    if len(rest) > 1 and not (sockets and any(given.values())):
        run(
            rest[1:],
            preload=given["--preload"],
            models=given["--model"],
            vary=given["--vary"],
            socket=sockets[-1] if sockets else "",
        )


def run(
    words: Sequence[str], *, preload: Sequence[str], models: Sequence[str], vary: Sequence[str], socket: str
) -> None:
    """Run a program in a fork, or as it is, and exit as it does. A *socket* is that of a server that runs already."""
    try:
        status = spawn_at(socket, words) if socket else spawn(words, preload=preload, models=models, vary=vary)
    except (PlainError, OSError) as error:
        say(f"not forked: {error}")
        try:
            run_plain(words, os.environ)
        except OSError:
            load("trimsfs.cli.run:become")(words, os.environ)  # reports it
    else:
        os._exit(status)  # the program has the descriptors that this process would flush
