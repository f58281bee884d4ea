"""From exec to the first output of programs that load a model: started as they are, and by ``trimsfs spawn``."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Program
from tests.benchmarks.contenders import trimsfs
from tests.benchmarks.models.cases import MXNET, Case, MissingError, chosen, interpreter, written
from tests.benchmarks.models.machine import wait_quiet
from tests.benchmarks.scaling.processes import Processes, watched
from trimsfs.extras.spawn.servers import DIRECTORY

STARTS = "starts"
FIRST, CPU, PRIVATE = "first output", "processor time to the first output", "private memory"
TOGETHER, TOGETHER_CPU = "the last of eight first outputs", "processor time to the last of eight first outputs"
EMPTY = "a program that does nothing"
PYTHON, RUN, SPAWN = "python", "trimsfs run", "trimsfs spawn"
RUN_SPAWN = "trimsfs run, trimsfs spawn"
RESIDENT = "trimsfs spawn, model preloaded"
INFERENCES = "inferences alone"
PROGRAMS = ("llama", "resnet", "onnx")
AT_ONCE = 8
PROCESSORS = 2
"""So many are shared by those."""
WARM_UPS = 3
"""A fork server learns from a program what to import, and its successor serves the next ones."""
STOP_S = 60
_MODULES = "tests.benchmarks.models.programs"
_TRIMSFS = Path(sys.executable).with_name("trimsfs")

Line = Sequence[str | Path]


def starts(bench: Bench) -> None:
    """Each program, each way, in turns, and then eight of it at once. Each has one thread."""
    with ExitStack() as stack:
        mount = stack.enter_context(bench.mounted(trimsfs(), bench.plain))
        processes = stack.enter_context(watched())
        fork_servers = stack.enter_context(_fork_servers(bench.work))
        # A module that prints is not preloaded, and the bar of transformers is a print.
        environment = fork_servers | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        _Starts(bench, processes, environment).empty()
        for case in chosen(bench, PROGRAMS):
            written(bench, case.directory)
            path = mount.path / case.directory
            model = {"TRIMSFS_BENCH_PROGRAM": case.program, "TRIMSFS_BENCH_MODEL": str(path)}
            measured = _Starts(bench, processes, environment | model)
            measured.one_by_one(case, path)
            measured.at_once(case, path)


@contextmanager
def _fork_servers(work: Path) -> Iterator[dict[str, str]]:
    """The variables by which programs get fork servers of this run alone, which end with it."""
    variables = {DIRECTORY: str(work / "fork-servers"), "XDG_CACHE_HOME": str(work / "fork-servers-cache")}
    try:
        yield variables
    finally:
        command = [str(_TRIMSFS), "spawn", "--stop"]
        subprocess.run(command, env={**os.environ, **variables}, check=True, timeout=STOP_S, capture_output=True)


@dataclass(slots=True)
class _Starts:
    """Measures programs that get some more variables, and all must give the same output."""

    bench: Bench
    processes: Processes
    environment: Mapping[str, str]
    _digests: set[str] = field(default_factory=set)

    def empty(self) -> None:
        """What a start costs by itself, of MXNet's interpreter: `trimsfs run` is made for it."""
        try:
            program: Line = [interpreter(MXNET), "-c", "print('{}', flush=True)"]
        except MissingError as missing:
            self.bench.results.skipped.append(f"{EMPTY}: {missing}")
            return
        lines = {PYTHON: program, RUN: [_TRIMSFS, "run", "--", *program], SPAWN: [_TRIMSFS, "spawn", "--", *program]}
        self._in_turns(self.bench.scale.starts, EMPTY, lines, [FIRST, CPU], self._empty)

    def one_by_one(self, case: Case, path: Path) -> None:
        """One program after the other."""
        self._in_turns(self.bench.scale.starts, case.name, self._lines(case, path), [FIRST, CPU, PRIVATE], self._one)

    def at_once(self, case: Case, path: Path) -> None:
        """Eight at once, and beside them the inferences of eight programs that have their model."""
        told = [*_program(case), case.program, path, "--told"]
        forked = {way: line for way, line in self._lines(case, path).items() if way in {SPAWN, RUN_SPAWN, RESIDENT}}
        lines = {INFERENCES: told, **forked}
        self._in_turns(self.bench.scale.starts_at_once, case.name, lines, [TOGETHER, TOGETHER_CPU], self._together)

    @staticmethod
    def _lines(case: Case, path: Path) -> dict[str, Line]:
        plain = [*_program(case), case.program, path]
        run: list[str | Path] = [_TRIMSFS, "run", "--"]
        spawn: list[str | Path] = [_TRIMSFS, "spawn", "--"]
        preload = f"--preload={_MODULES}.resident,{_MODULES}.first_output"
        return {
            PYTHON: plain,
            **({RUN: [*run, *plain], RUN_SPAWN: [*run, *spawn, *plain]} if case.environment == MXNET else {}),
            SPAWN: [*spawn, *plain],
            RESIDENT: [_TRIMSFS, "spawn", preload, "--", *_program(case), "resident", path],
        }

    def _in_turns(
        self,
        turns: int,
        case: str,
        lines: Mapping[str, Line],
        names: list[str],
        measure: Callable[[Line], Sequence[float]],
    ) -> None:
        ways = list(lines)
        for turn in range(-WARM_UPS, turns):
            first = turn % len(ways)
            for way in (*ways[first:], *ways[:first]):
                wait_quiet(self.bench.scale.quiet_s)
                if turn < 0:
                    measure(lines[way])
                else:
                    self.bench.take(STARTS, case, way, names, partial(measure, lines[way]))

    def _empty(self, line: Line) -> Sequence[float]:
        spent = self._spent()
        with self._begun(line) as program:
            program.outcome(self.bench.scale.timeout_s)
            return spent()

    def _one(self, line: Line) -> Sequence[float]:
        spent = self._spent()
        with self._begun(line) as program:
            outcome = self._outcome(program)
            return [*spent(), _private_bytes(outcome["pid"])]

    def _together(self, line: Line) -> Sequence[float]:
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(own)[:PROCESSORS])
        try:
            with ExitStack() as stack:
                spent = self._spent()
                programs = [stack.enter_context(self._begun(line)) for _ in range(AT_ONCE)]
                if line[-1] == "--told":
                    for program in programs:
                        program.wait_ready(self.bench.scale.model_timeout_s)
                    spent = self._spent()
                    for program in programs:
                        program.tell()
                for program in programs:
                    self._outcome(program)
                return spent()
        finally:
            os.sched_setaffinity(0, own)

    @contextmanager
    def _begun(self, line: Line) -> Iterator[Program]:
        """A program that ends by itself with the context."""
        with Program([*self.processes.enter, *map(str, line)], self.environment) as program:
            yield program
            program.end(self.bench.scale.timeout_s)

    def _spent(self) -> Callable[[], list[float]]:
        """Tells the seconds and the processor time from now on."""
        processor_s, begun = self.processes.cpu_s(), time.perf_counter()
        return lambda: [time.perf_counter() - begun, self.processes.cpu_s() - processor_s]

    def _outcome(self, program: Program) -> dict[str, int]:
        outcome = program.outcome(self.bench.scale.model_timeout_s)
        self._digests.add(outcome["digest"])
        if len(self._digests) > 1:
            raise ValueError(f"other outputs: {self._digests}")
        return outcome


def _program(case: Case) -> list[str | Path]:
    return [interpreter(case.environment), "-W", "ignore", "-m", f"{_MODULES}.first_output"]


def _private_bytes(pid: int) -> int:
    """The memory that a process has written, and no other one has."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))
