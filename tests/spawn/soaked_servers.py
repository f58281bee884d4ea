"""The fork servers of a soak, and what the kernel tells of processes."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.fork_servers import TIMEOUT_S, TRIMSFS, ForkServers
from tests.support.mounts import wait_until
from tests.support.processes import alive
from trimsfs.extras.spawn.servers import ask


class SharedServer(ForkServers):
    """A fork server at a socket, by the interface of `ForkServers`."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.socket = str(place / "s")
        command = [str(TRIMSFS), "spawn", "--preload=json,sqlite3", "--serve", self.socket, "--", sys.executable]
        self.process = subprocess.Popen(command, env=self.environment, start_new_session=True)
        wait_until(lambda: ask(self.socket, "tell") is not None)

    def line(self, *words: str | Path, options: tuple[str, ...] = ()) -> list[str]:
        return super().line(*words, options=("--socket", self.socket, *options))

    def pids(self) -> list[int]:
        return [self.process.pid]

    def facts(self) -> list[dict[str, Any]]:
        answer = ask(self.socket, "tell")
        return [] if answer is None else [answer[1]]


class Preloading(ForkServers):
    """Of which the command line says what they import."""

    def line(self, *words: str | Path, options: tuple[str, ...] = ()) -> list[str]:
        return super().line(*words, options=("--preload=json,sqlite3", *options))


class Chaos(ForkServers):
    """Which import a module that changes."""

    def __init__(self, place: Path, modules: Path) -> None:
        super().__init__(place)
        self.environment["PYTHONPATH"] = os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])])

    def line(self, *words: str | Path, options: tuple[str, ...] = ()) -> list[str]:
        return super().line(*words, options=("--preload=soaked_module", *options))


def settled(servers: ForkServers, program: Path) -> int:
    """The pid of a server that has all that a program imports: one that learns is replaced by one that knows."""
    servers.run(sys.executable, program, "exit", "0")
    first = servers.pids()
    servers.run(sys.executable, program, "fork")
    if type(servers) is ForkServers:
        wait_until(lambda: servers.pids() not in ([], first), TIMEOUT_S)
    (pid,) = servers.pids()
    return pid


def is_idle(servers: ForkServers, pid: int) -> bool:
    return all(each.get("running") == 0 for each in servers.facts()) and not children(pid)


def content(pid: int, name: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ")
    return ""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def fewest_descriptors(pid: int) -> int:
    """Some moments after those who asked have closed their connections."""
    counts = []
    for _ in range(10):
        counts.append(descriptors(pid))
        time.sleep(0.02)
    return min(counts)


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def zombies(pids: set[int]) -> list[int]:
    return [child for pid in pids for child in children(pid) if not alive(child)]
