"""A process table in place of the one in /proc."""

from collections.abc import Iterator

from trimsfs.processes import Process


class Processes:
    """A process table: the parent, program and container of each process, by pid."""

    def __init__(self) -> None:
        self.table: dict[int, tuple[Process, int, str, str | None]] = {}
        self._clock = 0

    def start(self, pid: int, parent: int = 0, *, program: str = "python", container: str | None = None) -> None:
        self._clock += 1
        self.table[pid] = Process(pid, self._clock), parent, program, container

    def end(self, pid: int) -> None:
        del self.table[pid]

    def lineage(self, pid: int) -> Iterator[tuple[Process, str]]:
        while pid in self.table:
            process, parent, program, _ = self.table[pid]
            yield process, program
            pid = parent

    def container_of(self, pid: int) -> str | None:
        return self.table[pid][3] if pid in self.table else None

    def runs(self, process: Process) -> bool:
        return process.pid in self.table and self.table[process.pid][0] == process
