"""Have `trimsfs spawn` start an engine's program, and compare what it prints with what a plain start does."""

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.engines import REPOSITORY
from tests.support.fork_servers import ForkServers, fork_servers
from tests.support.mounts import wait_until


@dataclass(frozen=True, slots=True)
class Forked:
    """How a program ran: *how* is "yes", or which modules the fork had to import itself, or why there was none.

    *equal* tells whether all starts printed the same. Times are those of whole runs, in seconds: a plain one, and one
    of a fork that had the imports.
    """

    how: str
    equal: bool
    plain_s: float
    forked_s: float


def forked(line: Sequence[str], directory: Path, place: Path, timeout_s: float) -> Forked:
    """Have a program load a *directory*: by itself, in a fork that tells its imports, and in one that has them.

    Sockets and what is learned are below *place*. Raises TimeoutExpired, and AssertionError if nothing is learned.
    """
    more: dict[str, Any] = {"input": f"{directory}\n\n", "cwd": REPOSITORY, "timeout": timeout_s}
    with fork_servers(place) as servers:

        def plain() -> "subprocess.CompletedProcess[str]":
            return subprocess.run(line, env=servers.environment, capture_output=True, text=True, check=False, **more)

        def fork() -> "subprocess.CompletedProcess[str]":
            return servers.run(*line, **more)

        first = fork()
        if (why := _refusal(first)) is None:
            wait_until(lambda: any(each.get("served") == 0 for each in servers.facts()), timeout_s)
        plain_s, itself = _timed(plain)
        forked_s, last = _timed(fork)
        return Forked(
            how=why or _refusal(last) or _left_out(servers) or "yes",
            equal=_output(first) == _output(itself) == _output(last),
            plain_s=plain_s,
            forked_s=forked_s,
        )


def _timed(
    run: Callable[[], "subprocess.CompletedProcess[str]"],
) -> "tuple[float, subprocess.CompletedProcess[str]]":
    begun = time.perf_counter()
    done = run()
    return time.perf_counter() - begun, done


def _refusal(done: "subprocess.CompletedProcess[str]") -> str | None:
    found = re.search(r"^trimsfs: not forked: (.*)", done.stderr, re.MULTILINE)
    return found and found[1]


def _left_out(servers: ForkServers) -> str:
    found = re.findall(r"^pid \d+: (\S+) is left out: (.*)", servers.command("--list").stdout, re.MULTILINE)
    return "; ".join(f"without {name}: {why}" for name, why in found)


def _output(done: "subprocess.CompletedProcess[str]") -> tuple[int, str]:
    """The exit status and what was printed, but for times and amounts of memory, which no two runs have in common."""
    return done.returncode, re.sub(r'("(?:load_s|mapped|copied)":) ?[\d.e-]+', r"\1", done.stdout)
