"""A terminal in which a program runs that draws on it, by tmux: keys go in, and the screen can be read."""

import shlex
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.support.mounts import wait_until


@dataclass(frozen=True, slots=True)
class Terminal:
    """A terminal of a tmux server of its own. When the program has ended, its exit code is on the screen."""

    name: str

    def __call__(self, *arguments: str) -> str:
        command = ["tmux", "-u", "-f", "/dev/null", "-L", self.name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self("send-keys", *keys)

    def screen(self) -> str:
        return self("capture-pane", "-p")

    def wait_for(self, text: str, timeout_s: float = 15) -> str:
        """Wait until the screen shows a text; the line with it."""
        shown: list[str] = []

        def found() -> bool:
            shown[:] = [line for line in self.screen().splitlines() if text in line]
            return bool(shown)

        try:
            wait_until(found, timeout_s)
        except AssertionError:
            raise AssertionError(f"{text!r} is not on the screen:\n{self.screen()}") from None
        return shown[0]


@contextmanager
def terminal(command: Sequence[str], *, columns: int = 160, lines: int = 30) -> Iterator[Terminal]:
    """Run a command in a terminal of this size."""
    found = Terminal(f"test-{uuid.uuid4().hex[:12]}")
    shell = f"stty sane; {shlex.join(command)}; echo ended with $?; stty -a; exec sleep 600"
    found("new-session", "-d", "-x", str(columns), "-y", str(lines), shell)
    try:
        yield found
    finally:
        found("kill-server")
