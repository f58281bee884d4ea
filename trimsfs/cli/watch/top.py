"""``trimsfs top``: mounts and models, live in a terminal, or once as text."""

import io
import os
import select
import signal
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console, Group
from rich.live import Live

from trimsfs.cli.control_client import Questions, ask_each, mount_over
from trimsfs.cli.output import fail_if_any, left_out, reported, say, show
from trimsfs.cli.watch import screen
from trimsfs.cli.watch.sample import History, Sample, take_sample
from trimsfs.command_group import complete_mounted, examples
from trimsfs.mountinfo import Mount, file_systems
from trimsfs.text import printable

TICK_S = 0.5
"""How often the screen is drawn anew at least."""
FIRST_ORDER = "u"
KEYS = {b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up", b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down"}
HELP = "sort: (n)ame (s)ize (d)isk (h)ost (o)pen (u)ses (f)etch   arrows choose   (p)in or unpin   (e)vict   (q)uit"
SHORT_HELP = "sort: n s d h o u f   arrows choose   (p)in   (e)vict   (q)uit"

Mounts = Callable[[], list[Mount]]


@click.command(epilog=examples("trimsfs top", "trimsfs top --interval 0.5 /models", "trimsfs top | grep llama"))
@click.argument("mountpoint", type=Path, shell_complete=complete_mounted, required=False)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.2, 3600),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Seconds from one question to a mount to the next. A mount that takes long to answer is asked less often.",
)
@reported
def top(mountpoint: Path | None, interval_s: float) -> None:
    """Watch mounts and models: use, tiers, users, fetches.

    Shows all mounts of this host, or the one that MOUNTPOINT lies on. Shows what of each model is on disk, in memory
    and on GPUs, which programs have it open, and how fast it is fetched. Shows which programs and jobs wait for what.

    Keys sort (n, s, d, h, o, u, f) and choose a model (arrows, or j and k). Press p to pin or unpin it, e to evict it,
    and q to end. In a pipe, prints all once as text; the exit code is 10 when a mount does not answer.

    DISK and HOST are those of `trimsfs ls`, of the files of which anything is here; memory is the sum of HOST in bytes.
    USES counts opens.
    """

    def chosen() -> list[Mount]:
        return [mount_over(mountpoint)] if mountpoint is not None else file_systems()

    if sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal:
        _Top(chosen, interval_s).run()
    else:
        _print(chosen())


def _print(mounts: list[Mount]) -> None:
    """Show all once, as text."""
    failures: list[tuple[str, str]] = []
    histories = []
    for mount, sample in left_out(ask_each(mounts, take_sample), failures):
        history = History(mount, 0)
        history.answered(sample, time.monotonic())
        histories.append(history)
        for line in screen.lines(history, sample.taken, asked=False):
            say(line)
    rows = screen.ranked(histories, FIRST_ORDER)
    if rows:
        click.echo()
        show(screen.table(rows), left=1, last=True)
    elif not mounts:
        click.echo("no trimsfs mounts")
    fail_if_any(failures)


@contextmanager
def _keyboard() -> Iterator[None]:
    """Keys come at once and are not shown, until the block ends, however it does."""

    def end(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = termios.tcgetattr(0)
    old = signal.signal(signal.SIGTERM, end)
    try:
        tty.setcbreak(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, old)


class _Top:
    """The live display. Mounts are asked in child processes, so that one that hangs holds nothing up."""

    def __init__(self, mounts: Mounts, interval_s: float) -> None:
        self._mounts = mounts
        self._interval_s = interval_s
        self._histories: dict[int, History] = {}
        self._questions = Questions[Sample]()
        self._order = FIRST_ORDER
        self._rows: list[screen.Row] = []
        self._selected: str | None = None
        self._to_evict: str | None = None
        self._command: tuple[str, subprocess.Popen[str]] | None = None
        self._message = ""
        self._ended = False

    def run(self) -> None:
        """Show what happens until a key ends it."""
        console = Console()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal takes UTF-8
        with _keyboard(), Live(console=console, screen=True, auto_refresh=False) as live:
            while not self._ended:
                self._ask()
                self._hear_command()
                live.update(self._view(console), refresh=True)
                for mount, answer in self._questions.answers(TICK_S, 0):
                    if mount.number in self._histories:
                        self._histories[mount.number].answered(answer, time.monotonic(), len(self._histories))
                for key in self._keys():
                    self._press(key)

    def _ask(self) -> None:
        """Ask those mounts whose time it is."""
        now, known = time.monotonic(), self._histories
        self._histories = {
            mount.number: known.get(mount.number) or History(mount, self._interval_s) for mount in self._mounts()
        }
        asked = {mount.number for mount in self._questions.under_way()}
        for number, history in self._histories.items():
            if number not in asked and now >= history.due:
                history.asked = now
                self._questions.ask(history.mount, take_sample)

    def _view(self, console: Console) -> Group:
        now = time.monotonic()
        asked = {mount.number for mount in self._questions.under_way()}
        title = f"trimsfs top, by {screen.ORDERS[self._order][0]}, every {self._interval_s:g} s, {time.ctime()}"
        for brief in (False, True):
            above = [title, *([] if self._histories else ["no trimsfs mounts"])]
            for number, history in self._histories.items():
                gap = [] if brief else [""]
                above += [*gap, *screen.lines(history, now, asked=number in asked, brief=brief)]
            if len(above) <= console.height // 2:
                break
        self._rows = screen.ranked(self._histories.values(), self._order)
        if self._selected not in {row[0] for row in self._rows}:
            self._selected = self._rows[0][0] if self._rows else None
        keys = HELP if console.width > len(HELP) else SHORT_HELP
        footer = f"evict {self._to_evict}? y or n" if self._to_evict is not None else self._message or keys
        return screen.view(above, self._rows, self._selected, printable(footer), console.size)

    def _keys(self) -> Iterator[str]:
        """The keys that have been pressed."""
        if not select.select([0], [], [], 0)[0]:
            return
        pressed = os.read(0, 1024)
        self._ended = not pressed  # the terminal is gone
        while pressed:
            sequence = next((each for each in KEYS if pressed.startswith(each)), pressed[:1])
            pressed = pressed[len(sequence) :]
            yield KEYS.get(sequence, sequence.decode(errors="replace"))

    def _press(self, key: str) -> None:
        self._message = ""
        if self._to_evict is not None:
            path, self._to_evict = self._to_evict, None
            if key == "y":
                self._give("evict", path)
            return
        paths = [row[0] for row in self._rows]
        match key:
            case "q":
                self._ended = True
            case "up" | "down" if self._selected is not None:
                place = paths.index(self._selected) + (1 if key == "down" else -1)
                self._selected = paths[max(0, min(place, len(paths) - 1))]
            case "e":
                self._to_evict = self._selected
            case "p" if self._selected is not None:
                model = self._rows[paths.index(self._selected)][1]
                self._give(*(["unpin"] if model.pinned == model.files else ["pin", "--background"]), self._selected)
            case _ if key in screen.ORDERS:
                self._order = key

    def _give(self, *command: str) -> None:
        """Give a command, which goes on beside this."""
        if self._command is not None:
            self._message = "the command before has not ended"
            return
        command_line = " ".join(command)
        self._message = f"{command_line}: under way"
        process = subprocess.Popen(
            [sys.executable, "-m", "trimsfs", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._command = command_line, process

    def _hear_command(self) -> None:
        """Show what a command has come to, and what has changed."""
        if self._command is None or self._command[1].poll() is None:
            return
        command_line, process = self._command
        last = process.communicate()[0].strip().rpartition("\n")[2]
        self._message = f"{command_line}: job {last}" if last.isalnum() else last
        self._command = None
        for history in self._histories.values():
            history.due = 0.0
