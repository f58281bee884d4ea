"""Each process sees one target of an alias, with all that it starts; a new process sees the newest."""

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest
import trio

from tests.unit.namespace.processes import Processes
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.namespace.alias_targets import LOOKS, AliasTargets

PROD = "m/prod"


class Aliases:
    """Aliases that move, as processes see them."""

    def __init__(self, ledger: Ledger | None = None, most: int = 100) -> None:
        self.targets = AliasTargets(ledger or Ledger(), most=most)
        self.newest = "v1"
        self.asked = 0

    async def seen_by(self, thread: int, path: str = PROD) -> str:
        async def newest() -> str:
            self.asked += 1
            return self.newest

        return await self.targets.follow(path, thread, newest)


async def test_a_process_sees_one_target_for_its_life(processes: Processes) -> None:
    aliases = Aliases()
    processes.start(7)
    assert await aliases.seen_by(7001) == "v1"
    aliases.newest = "v2"
    assert [await aliases.seen_by(thread) for thread in (7001, 7002, 7)] == ["v1"] * 3
    assert aliases.asked == 1
    processes.start(8)
    assert await aliases.seen_by(8) == "v2"
    assert await aliases.seen_by(7, "other/prod") == "v2"


async def test_what_a_process_starts_sees_the_same_also_after_its_end(processes: Processes) -> None:
    aliases = Aliases()
    processes.start(1)
    processes.start(7, 1)
    processes.start(8, 7)
    assert await aliases.seen_by(7) == "v1"
    aliases.newest = "v2"
    processes.start(9, 8)
    assert await aliases.seen_by(9) == "v1"
    processes.end(7)
    assert await aliases.seen_by(9) == "v1"
    assert await aliases.seen_by(8) == "v2"  # it had seen none, and nothing above it that runs has


async def test_a_later_process_of_the_same_pid_is_another(processes: Processes) -> None:
    aliases = Aliases()
    processes.start(7)
    assert await aliases.seen_by(7) == "v1"
    processes.end(7)
    aliases.newest = "v2"
    processes.start(7)
    assert await aliases.seen_by(7) == "v2"


async def answered_in_turn(*asking: tuple[int, str]) -> dict[int, str]:
    """What processes see that ask at once, by pid, if the store answers one after the other: the last of them first."""
    targets = AliasTargets(Ledger())
    gates = [trio.Event() for _ in asking]
    seen = dict[int, str]()

    async def ask(thread: int, target: str, gate: trio.Event) -> None:
        async def newest() -> str:
            await gate.wait()
            return target

        seen[thread] = await targets.follow(PROD, thread, newest)

    async with trio.open_nursery() as nursery:
        for (thread, target), gate in zip(asking, gates, strict=True):
            nursery.start_soon(ask, thread, target, gate)
        for gate in reversed(gates):
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
    return seen


async def test_two_threads_that_ask_at_once_see_the_same(processes: Processes) -> None:
    processes.start(7)
    assert await answered_in_turn((7001, "v1"), (7002, "v2")) == {7001: "v2", 7002: "v2"}


async def test_a_process_and_its_parent_that_ask_at_once_see_the_same(processes: Processes) -> None:
    processes.start(7)
    processes.start(8, 7)
    assert await answered_in_turn((8, "v1"), (7, "v2")) == {7: "v2", 8: "v2"}


async def test_processes_of_one_container_that_ask_at_once_see_the_same(processes: Processes) -> None:
    processes.start(7, container="c1")
    processes.start(8, container="c1")
    processes.start(9, container="c2")
    assert await answered_in_turn((9, "v0"), (8, "v1"), (7, "v2")) == {7: "v2", 8: "v2", 9: "v0"}


async def test_who_starts_containers_and_services_sees_the_newest(processes: Processes) -> None:
    aliases = Aliases()
    processes.start(1, program="systemd")
    processes.start(7, 1, program="containerd")
    assert [await aliases.seen_by(pid) for pid in (1, 7)] == ["v1"] * 2
    aliases.newest = "v2"
    assert [await aliases.seen_by(pid) for pid in (1, 7)] == ["v2"] * 2
    processes.start(8, 7, program="runc")
    assert await aliases.seen_by(8) == "v2"


async def test_a_container_sees_one_target_while_a_process_that_has_seen_it_runs(processes: Processes) -> None:
    aliases = Aliases()
    processes.start(7, container="c1")
    assert await aliases.seen_by(7) == "v1"
    aliases.newest = "v2"
    processes.start(8, container="c1")  # as `podman exec` does
    processes.start(9, container="c2")
    assert [await aliases.seen_by(pid) for pid in (8, 9)] == ["v1", "v2"]
    processes.end(7)
    processes.end(8)
    processes.start(10, container="c1")
    assert await aliases.seen_by(10) == "v2"


async def test_a_thread_of_another_pid_namespace_sees_the_newest(processes: Processes) -> None:
    aliases = Aliases()
    assert await aliases.seen_by(0) == "v1"
    aliases.newest = "v2"
    assert await aliases.seen_by(0) == "v2"
    assert len(aliases.targets) == 0


async def test_a_process_that_proc_hides_sees_the_newest_and_the_log_says_so_once(
    processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    aliases = Aliases()
    assert await aliases.seen_by(os.getpid()) == "v1"  # it exists, and is not in the table
    aliases.newest = "v2"
    assert await aliases.seen_by(os.getpid()) == "v2"
    assert caplog.text.count("/proc hides processes") == 1
    caplog.clear()


async def test_processes_that_have_ended_are_forgotten(processes: Processes) -> None:
    aliases = Aliases()
    for pid in range(10, 20):
        processes.start(pid)
        await aliases.seen_by(pid)
    for pid in range(20, 1000):
        processes.start(pid)
        await aliases.seen_by(pid)
        processes.end(pid)
    assert len(aliases.targets) <= 10 + LOOKS
    aliases.newest = "v2"
    assert [await aliases.seen_by(pid) for pid in range(10, 20)] == ["v1"] * 10


async def test_the_number_of_processes_is_bounded(processes: Processes, caplog: pytest.LogCaptureFixture) -> None:
    aliases = Aliases(most=20)
    for pid in range(10, 100):
        processes.start(pid)
        await aliases.seen_by(pid)
    assert len(aliases.targets) == 20
    assert caplog.text.count("more than 20 processes use aliases") == 1
    caplog.clear()


async def test_targets_outlive_the_server_until_their_process_has_ended(
    processes: Processes, ledger: Callable[[], Ledger]
) -> None:
    first = Aliases(ledger())
    for pid in (7, 8):
        processes.start(pid)
        await first.seen_by(pid)
        await first.seen_by(pid, "other/prod")
    second = Aliases(ledger())
    second.newest = "v2"
    assert await second.seen_by(7) == "v1"
    processes.end(8)
    for pid in range(9, 9 + LOOKS):
        processes.start(pid)
        await second.seen_by(pid)
    third = ledger()
    assert {record.number for record in third.inherited(RecordKind.ALIAS_TARGET)} == {7, *range(9, 9 + LOOKS)}


@pytest.fixture
def child() -> Iterator[int]:
    """A process that this one has started."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


async def test_real_processes_are_told_apart(child: int) -> None:
    aliases = Aliases()
    assert await aliases.seen_by(os.getpid()) == "v1"
    aliases.newest = "v2"
    assert await aliases.seen_by(child) == "v1"
    assert await aliases.seen_by(2) == "v2"  # the kernel's, which no process starts
