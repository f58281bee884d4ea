"""``trimsfs run`` without the imports of the other commands, which would delay every program that it starts."""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

import trimsfs.client
from trimsfs.client.import_hook import VERBOSE

STARTUP = os.path.join(trimsfs.client.__path__[0], "startup")


def main(words: Sequence[str]) -> None:
    """Become the program that a command line names; return if it has options, or an error is to be reported."""
    if len(words) > 1 and words[0] == "--":
        with suppress(OSError):  # the full command tries again, and reports
            run_plain(words[1:], environment())


def environment(*, verbose: bool = False) -> dict[str, str]:
    """This process's environment, with what makes MXNet map models in each Python program."""
    places = [STARTUP, *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {"PYTHONPATH": os.pathsep.join(places)} | ({VERBOSE: "1"} if verbose else {})
    return {**os.environ, **added}


def run_plain(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Become *command*. Raises OSError if there is no such program, or it cannot be executed."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and the program would inherit that
    os.execvpe(command[0], list(command), environment)
