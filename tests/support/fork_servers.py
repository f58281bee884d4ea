"""Runs programs by `trimsfs spawn`, with fork servers of a test's own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.support.mounts import wait_until
from trimsfs.extras.spawn.servers import DIRECTORY, Directory

TRIMSFS = Path(sys.executable).with_name("trimsfs")
TIMEOUT_S = 60


def own_environment() -> dict[str, str]:
    """The variables of this process, without those that a test runner changes at each test."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}


class ForkServers:
    """Fork servers with their sockets below a directory of a test."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.environment = {
            **own_environment(),
            DIRECTORY: str(place / "sockets"),
            "XDG_CACHE_HOME": str(place / "cache"),
        }

    def line(self, *words: str | Path, options: tuple[str, ...] = ()) -> list[str]:
        """The command line that has a program forked."""
        return [str(TRIMSFS), "spawn", *options, "--", *map(str, words)]

    def run(
        self, *words: str | Path, options: tuple[str, ...] = (), environment: dict[str, str] | None = None, **more: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program in a fork, and wait for its end."""
        defaults = {"capture_output": True, "text": True, "timeout": TIMEOUT_S}
        variables = self.environment | (environment or {})
        return subprocess.run(self.line(*words, options=options), env=variables, check=False, **defaults | more)

    def plain(self, *words: str | Path, environment: dict[str, str] | None = None) -> str:
        """What a program prints that is started as it is."""
        variables = self.environment | (environment or {})
        done = subprocess.run(words, env=variables, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        return done.stdout

    def start(self, *words: str | Path, **more: Any) -> "subprocess.Popen[str]":
        """Start a program in a fork."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.line(*words), stdout=pipe, stderr=pipe, text=True, env=self.environment, **more)

    def pids(self) -> list[int]:
        """The fork servers that run."""
        if not list((self.place / "sockets").glob("*.socket")):
            return []
        directory = self.directory
        answers = [directory.ask(name, "tell") for name in directory.names()]
        return sorted(answer[0] for answer in answers if answer is not None)

    def facts(self) -> list[dict[str, Any]]:
        """What each server tells of itself."""
        directory = self.directory
        return [answer[1] for name in directory.names() if (answer := directory.ask(name, "tell"))]

    def logs(self) -> str:
        """What the servers have logged."""
        return "".join(path.read_text() for path in sorted((self.place / "sockets").glob("*.log")))

    def command(self, *options: str) -> "subprocess.CompletedProcess[str]":
        """`trimsfs spawn` with *options*, and no program."""
        return subprocess.run(
            [TRIMSFS, "spawn", *options],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    @cached_property
    def directory(self) -> Directory:
        with _variable(DIRECTORY, self.environment[DIRECTORY]):
            return Directory()


@contextmanager
def fork_servers(place: Path) -> Iterator[ForkServers]:
    """Fork servers that end with the test."""
    servers = ForkServers(place)
    try:
        yield servers
    finally:
        pids = servers.pids()
        servers.command("--stop")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not any(Path(f"/proc/{pid}/fd").exists() and _runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
