"""Child processes that measure, each wait for them bounded."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

READY_S = 60
REPOSITORY = Path(__file__).parents[2]


class TooSlowError(Exception):
    """A measurement took longer than it may."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"> {limit_s:g} s")


class ChildError(Exception):
    """A child process failed; the message is the end of what it said."""


class Program:
    """A process that prints ``ready``, waits for lines, and prints its outcomes as JSON; libraries may print, too.

    It has more variables if *environment* has some, and is killed when the context ends.
    """

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self._rest = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=REPOSITORY,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(READY_S)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Return once it waits for the word. Raises as `outcome`."""
        self._line(timeout_s)

    def tell(self, word: str | Path = "") -> None:
        """Give it the word."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())

    def outcome(self, timeout_s: float) -> dict[str, Any]:
        """What it prints next. Raises TooSlowError, or ChildError when it fails."""
        outcome: dict[str, Any] = json.loads(self._line(timeout_s))
        return outcome

    def end(self, timeout_s: float) -> None:
        """Have it end by itself. Raises ChildError when it fails, TimeoutExpired."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(timeout_s):
            raise ChildError(self._last_words())

    def run(self, timeout_s: float) -> dict[str, Any]:
        """Have it act, and end it; its outcome. Raises as `outcome`."""
        with self:
            begin([self])
            return self.outcome(timeout_s)

    def _line(self, timeout_s: float) -> bytes:
        """The next line that is the program's own."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._any_line(deadline, timeout_s)
            if line.startswith(b"{") or line == b"ready":
                return line

    def _any_line(self, deadline: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TooSlowError(timeout_s)
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise ChildError(self._last_words())
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").splitlines()
        return lines[-1] if lines else f"ended with status {self._process.wait(READY_S)}"


class Child(Program):
    """A process of a module here, by an interpreter that may be another."""

    def __init__(
        self,
        module: str,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        python: str | Path = sys.executable,
        **options: float | str | Path,
    ) -> None:
        named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [python, "-W", "ignore", "-m", f"tests.benchmarks.{module}", *map(str, arguments), *named]
        super().__init__(command, environment)


def begin(children: Sequence[Program], timeout_s: float = READY_S) -> None:
    """Have processes act at once, as soon as all of them are ready."""
    for child in children:
        child.wait_ready(timeout_s)
    for child in children:
        child.tell()


def measure(action: str, path: Path, timeout_s: float, **options: Any) -> dict[str, float]:
    """The outcome of one action of `reader`."""
    return Child("reader", action, path, **options).run(timeout_s)
