"""Runs many programs in forks, several at once, and compares each with what it does when it is started plainly."""

import os
import random
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.spawn import soaked_program
from tests.spawn.soaked_servers import (
    Chaos,
    Preloading,
    SharedServer,
    content,
    descriptors,
    fewest_descriptors,
    is_idle,
    settled,
    state,
    zombies,
)
from tests.support.fork_servers import TIMEOUT_S, ForkServers
from tests.support.mounts import wait_until
from tests.support.processes import alive
from trimsfs.extras.spawn.servers import memory_of
from trimsfs.extras.spawn.session import LEAST_FILES

AT_ONCE = 6
PROGRAM = Path(soaked_program.__file__)
ENDED = "trimsfs: the fork server has ended, and the program with it\n"
NOT_FORKED = "trimsfs: not forked: "
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGPIPE)
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-")
Line = Callable[..., list[str]]
"""Makes the command line of a program from its words."""
Outcome = tuple[int, str, str]


class Soak:
    """Some fork servers, and the programs that run in forks of them.

    The *steady* servers live through all. Those of *chaos* are killed, told to end and made stale meanwhile, and those
    of *poor* are short of something.
    """

    def __init__(self, directory: Path, full: Path, group: Path | None, seed: str) -> None:
        self.seed = seed
        self.directory = directory
        self._full = full
        self._group = group
        self.steady: dict[str, ForkServers] = {}
        self._chaos: ForkServers
        self._poor: ForkServers
        self._killed_at: list[float] = []
        self._version = 0
        self._lock = threading.Lock()
        self._pids: dict[str, int] = {}
        self._first: dict[int, tuple[int, int]] = {}
        self.counts: Counter[str] = Counter()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Start the servers, and end them."""
        kinds = {"learning": ForkServers, "preloading": Preloading, "shared": SharedServer}
        try:
            for name, kind in kinds.items():
                self.steady[name] = kind(self.directory / name)
            self._chaos = Chaos(self.directory / "chaos", self.directory / "modules")
            self._poor = ForkServers(self.directory / "poor")
            self._write_module()
            for name, servers in self.steady.items():
                self._pids[name] = settled(servers, PROGRAM)
            yield
        finally:
            for pid in self.ours():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if "shared" in self.steady:
                shared = self.steady["shared"]
                assert isinstance(shared, SharedServer)
                shared.process.wait()

    def run(self, numbers: range) -> None:
        """Run programs. Raises ExceptionGroup of what does not do what it should."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            failed = [error for error in pool.map(self._one, numbers) if error is not None]
        if failed:
            raise ExceptionGroup(f"seed {self.seed}", failed)

    def _one(self, number: int) -> Exception | None:
        rng = random.Random(f"{self.seed}/{number}")
        act = rng.choice(self._acts())
        self.counts[act.__name__] += 1
        told, held = os.pipe()
        try:
            try:
                act(rng, f"{number}", held)
            finally:
                os.close(held)
            assert select.select([told], [], [], TIMEOUT_S)[0], "something that it started runs on"
            assert os.read(told, 1) == b""
        except Exception as error:
            error.add_note(f"number {number}, {act.__name__}")
            return error
        else:
            return None
        finally:
            os.close(told)

    def _acts(self) -> list[Callable[[random.Random, str, int], None]]:
        often = [self.ends, self.ends, self.ends, self.ends_of_itself, self.is_ended, self.caller_is_killed]
        limited = [self.few_descriptors, *([self.processes] if self._group else [])]
        some = [self.stops, self.in_namespaces, self.lives_on, self.pipes, self.full_disks, *limited]
        return [*often, *often, *some, *[self.chaos] * 4, *[self.ends_servers] * 2]

    # Each act has a name, and a descriptor that all that it starts has.

    def ends(self, rng: random.Random, name: str, held: int) -> None:
        alone = [(word,) for word in ("raise", "text", "much", "fork", "close")]
        status = f"{rng.randrange(256)}"
        words = rng.choice([("exit", status), ("_exit", status), ("echo", name, "ü"), *alone])
        self._same(self._any(rng), held, *words)

    def ends_of_itself(self, rng: random.Random, _: str, held: int) -> None:
        words = rng.choice([("segv",), ("abort",), ("die", f"{int(rng.choice(ENDING))}")])
        self._same(self._any(rng), held, *words)

    def is_ended(self, rng: random.Random, _: str, held: int) -> None:
        """A signal ends the program, or its caller."""
        servers, number, to_caller = self._any(rng), rng.choice(ENDING), rng.random() < 0.5

        def outcome(line: Line) -> Outcome:
            caller = self._start(servers, line("wait"), held)
            assert caller.stdout is not None
            pid = int(caller.stdout.readline())
            wait_until(lambda: state(pid) == "S", TIMEOUT_S)  # it sleeps: a traceback names the same line
            os.kill(caller.pid if to_caller else pid, number)
            ended = self._ended(caller)
            wait_until(lambda: not alive(pid), TIMEOUT_S)
            return ended

        self._equal(outcome(self._forked(servers)), outcome(_plain))

    def caller_is_killed(self, rng: random.Random, _: str, held: int) -> None:
        """At any moment: before there is a fork, or after."""
        servers = rng.choice([*self.steady.values(), self._poor])
        caller = self._start(servers, self._forked(servers)("wait"), held)
        time.sleep(rng.uniform(0, 0.3))
        caller.kill()
        self._ended(caller)

    def stops(self, rng: random.Random, name: str, held: int) -> None:
        """Who is stopped goes on, by a signal to the program or to its caller, or is killed."""
        servers = self._any(rng)
        stopped, roused = rng.choice([("program", "program"), ("program", "caller"), ("caller", "caller")])
        number = signal.SIGCONT if stopped == "caller" else rng.choice([signal.SIGCONT, signal.SIGKILL])

        def outcome(line: Line) -> Outcome:
            caller = self._start(servers, line("stop"), held)
            assert caller.stdout is not None
            pids = {"caller": caller.pid, "program": int(caller.stdout.readline())}
            os.kill(pids[stopped], signal.SIGSTOP)
            wait_until(lambda: state(caller.pid) == "T", TIMEOUT_S)
            os.kill(pids[roused], number)
            return self._ended(caller, name)

        self._equal(outcome(self._forked(servers)), outcome(_plain))

    def in_namespaces(self, rng: random.Random, name: str, held: int) -> None:
        """The fork joins those of its caller, which is their first process: to a signal, its status is another."""
        words = rng.choice([("exit", f"{rng.randrange(256)}"), ("echo", name), ("raise",), ("fork",)])
        start = 'exec unshare --mount --pid --fork --kill-child --mount-proc "$@"'
        self._same(self.steady["shared"], held, *words, before=start)

    def lives_on(self, rng: random.Random, name: str, held: int) -> None:
        """What a program has forked outlives it."""
        path = self.directory / name
        self._same(self._any(rng), held, "daemon", str(path))
        wait_until(path.exists, TIMEOUT_S)

    def pipes(self, rng: random.Random, name: str, held: int) -> None:
        """Standard streams are closed, or nobody reads them."""
        servers, path = self._any(rng), self.directory / name
        how = rng.choice(["| true", *CLOSED])
        script = 'set -o pipefail; "$@" | true' if how == "| true" else f'exec "$@" {how}'
        words = ("much",) if how == "| true" else ("streams", str(path))

        def outcome(line: Line) -> tuple[Outcome, str]:
            ended = self._ended(self._start(servers, _shell(script, line(*words)), held), "some input")
            return ended, path.read_text() if path.exists() else ""

        forked, plain = outcome(self._forked(servers)), outcome(_plain)
        assert forked == plain, f"{how}: {forked} in a fork, {plain} plainly"

    def full_disks(self, rng: random.Random, name: str, held: int) -> None:
        """What the program writes to, or the directory of the sockets, or of what was learned, is on a full disk."""
        what = rng.choice(["output", "DIRECTORY", "cache", "both", "messages"])
        servers = self._any(rng)
        if what == "output":
            self._same(servers, held, "much", how=f"> {shlex.quote(str(self._full / name))}")
        elif what == "messages":  # a note that it is not forked cannot be written
            self._same(self._chaos, held, "exit", "3", how="2> /dev/full", options=("--model=/nonexistent",))
        else:
            more = {"TRIMSFS_SPAWN_DIR": str(self._full / "sockets")} if what != "cache" else {}
            more |= {"XDG_CACHE_HOME": str(self._full / "cache")} if what != "DIRECTORY" else {}
            self._same(self._poor, held, rng.choice(["fork", "echo"]), may_be_plain=True, more=more)

    def few_descriptors(self, rng: random.Random, _: str, held: int) -> None:
        """The limit that programs may raise, or none may."""
        hard, number = (
            rng.random() < 0.3,
            rng.choice([rng.randrange(8, 40), rng.randrange(LEAST_FILES, LEAST_FILES + 40)]),
        )
        servers = self._poor if hard else self._any(rng)
        limit = f"ulimit -{'H' if hard else ''}Sn {number}"
        self._same(servers, held, "files", before=limit, may_be_plain=True)

    def processes(self, rng: random.Random, name: str, held: int) -> None:
        """There may be only some processes in the control group of the caller."""
        assert self._group is not None
        before = f"echo $$ > {self._group}/cgroup.procs"
        self._same(self._poor, held, *rng.choice([("exit", "3"), ("echo", name)]), before=before, may_be_plain=True)

    def chaos(self, rng: random.Random, name: str, held: int) -> None:
        """The servers end meanwhile, or a module changes."""
        words = rng.choice([("module",), ("echo", name), ("exit", "7"), *[("wait",)] * 3])
        version, began_at = self._version, time.monotonic()
        caller = self._start(self._chaos, self._forked(self._chaos)(*words), held)
        if words == ("wait",):
            time.sleep(rng.uniform(0, 0.5))
            caller.terminate()
        status, output, errors = self._ended(caller, name)
        errors = self._without_notes(errors, may_be_plain=True)
        if errors == ENDED:
            assert any(killed > began_at for killed in self._killed_at), "no server was killed"
            assert status == -signal.SIGKILL, status
            self.counts["ended with their server"] += 1
        elif words == ("module",):
            assert (status, errors) == (0, ""), errors
            assert version <= int(output) <= self._version, f"between {version} and {self._version}"
        elif words == ("wait",):
            assert status == -signal.SIGTERM, (status, errors)
        else:
            self._equal((status, output, errors), self._ended(self._start(self._chaos, _plain(*words), held), name))

    def ends_servers(self, rng: random.Random, _: str, held: int) -> None:
        how = rng.choice(["kill", "--stop", "--list", "change"])
        if how == "kill":
            for pid in self._chaos.pids():
                self._killed_at.append(time.monotonic() + TIMEOUT_S)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._killed_at[-1] = time.monotonic() + 1  # whom it ended may have begun since
        elif how == "change":
            self._write_module()
        else:
            done = self._chaos.command(how)
            assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr

    def _write_module(self) -> None:
        with self._lock:
            place = self.directory / "modules"
            place.mkdir(exist_ok=True)
            (place / "new").write_text(f"VERSION = {self._version + 1}")
            self._version += 1
            (place / "new").rename(place / "soaked_module.py")

    # What servers and processes there are.

    def _any(self, rng: random.Random) -> ForkServers:
        return rng.choice(list(self.steady.values()))

    def ours(self) -> list[int]:
        """All processes that have the mark of this soak's servers, or of their callers."""
        mark = f"={self.directory}/".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def look(self) -> None:
        """Nothing is left of what has ended, and the servers that live have no more than they had at the first look."""
        with suppress(AssertionError):  # what is left is told
            wait_until(lambda: not self._left(), TIMEOUT_S)
        assert not (left := self._left()), "\n".join(left)
        for name, each in self.steady.items():
            (pid,) = each.pids()
            assert pid == self._pids[name], f"{name} is another server than at first"
            wait_until(lambda each=each, pid=pid: is_idle(each, pid), TIMEOUT_S)  # type: ignore[misc]
            first, memory = self._first.setdefault(pid, (fewest_descriptors(pid), memory_of(pid)))
            wait_until(lambda pid=pid, first=first: descriptors(pid) <= first, TIMEOUT_S)  # type: ignore[misc]
            print(f"{name}: {descriptors(pid)} descriptors, {memory_of(pid) >> 10} KiB; at first {memory >> 10} KiB")
            assert memory_of(pid) <= memory * 1.05, name
        for each in (self.steady["learning"], self.steady["preloading"], self._chaos, self._poor):
            each.command("--list")
            names = {path.name for path in (each.place / "sockets").iterdir()} - {"lock"}
            keys = {name.partition(".")[0] for name in names}
            assert names == {f"{key}.{kind}" for key in keys for kind in ("socket", "settings", "log")}
            assert len(keys) == len(each.pids())

    def _left(self) -> list[str]:
        """What is not a fork server that answers: processes, and children that nobody has waited for."""
        ours = self.ours()
        servers = {pid for each in (*self.steady.values(), self._chaos, self._poor) for pid in each.pids()}
        others = [pid for pid in {*ours} - servers if f"={self._full}/" not in content(pid, "environ")]
        return [f"{pid}: {content(pid, 'cmdline')}{content(pid, 'status')}" for pid in [*others, *zombies(servers)]]

    # How a program is run.

    def _forked(self, servers: ForkServers, options: tuple[str, ...] = ()) -> Line:
        return lambda *words: servers.line(sys.executable, PROGRAM, *words, options=options)

    def _start(
        self, servers: ForkServers, line: Sequence[str], held: int, more: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        variables = servers.environment | (more or {})
        return subprocess.Popen(
            line,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=variables,
            pass_fds=[held],
            start_new_session=True,
        )

    @staticmethod
    def _ended(caller: "subprocess.Popen[str]", text: str | None = None) -> Outcome:
        try:
            output, errors = caller.communicate(text, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            hangs = f"the caller hangs in state {state(caller.pid)}"
            caller.kill()
            raise AssertionError(hangs) from error
        return caller.returncode, output, errors

    def _same(
        self,
        servers: ForkServers,
        held: int,
        *words: str,
        before: str = ":",
        how: str = "",
        options: tuple[str, ...] = (),
        may_be_plain: bool = False,
        more: dict[str, str] | None = None,
    ) -> None:
        """Run a program both ways, after a command and with redirections of the shell."""
        script = f'{before}; exec "$@" {how}'
        outcomes = []
        for line in (self._forked(servers, options), _plain):
            ended = self._ended(self._start(servers, _shell(script, line(*words)), held, more), "some input")
            outcomes.append(ended)
        self._equal(*outcomes, may_be_plain=may_be_plain)

    def _equal(self, forked: Outcome, plain: Outcome, *, may_be_plain: bool = False) -> None:
        status, output, errors = forked
        errors = self._without_notes(errors, may_be_plain=may_be_plain)
        same = (status, sorted(output.split()), errors) == (plain[0], sorted(plain[1].split()), plain[2])
        assert same, f"{forked} in a fork, {plain} plainly"

    def _without_notes(self, errors: str, *, may_be_plain: bool) -> str:
        """Standard error without the lines that say why a program was not forked."""
        lines = errors.splitlines(keepends=True)
        notes = [line for line in lines if line.startswith(NOT_FORKED)]
        assert may_be_plain or not notes, notes
        for note in notes:
            self.counts[note.strip()[:90]] += 1
        return "".join(line for line in lines if line not in notes)


def _plain(*words: str) -> list[str]:
    return [sys.executable, str(PROGRAM), *words]


def _shell(script: str, line: Sequence[str]) -> list[str]:
    return ["bash", "-c", script, "bash", *line]
