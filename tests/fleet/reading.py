"""Programs on members that read together and compare what they get, and what they read."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tests.benchmarks.children import Child, begin
from tests.fleet.members import Fleet, Member
from tests.support.mounts import MountedStore, wait_until

T = TypeVar("T")

READ_S = 60
TRIES = 3
"""How often something is measured at most."""
_AGAIN = ("fleet_slow_requests", "fleet_busy_requests", "fleet_store_chunks", "store_failed_attempts")
"""What counts requests after which a chunk comes once more, as when the machine has stood still for seconds."""


class Mounted(Protocol):
    """A host with a mount."""

    @property
    def mount(self) -> MountedStore: ...


def new_object(fleet: Fleet, name: str, size: int) -> Path:
    """An object that all members show, named by this file and in the store."""
    path = fleet.directory / f"{name}.bin"
    path.write_bytes(random.Random(name).randbytes(size))
    fleet.store.put({path.name: path.read_bytes()})
    for member in fleet.members:
        wait_until((member.mount.path / path.name).exists)  # for up to 5 s, a new name is not there yet
    return path


def undisturbed(members: Sequence[Mounted], measure: Callable[[int], T]) -> T:
    """What comes of something done with an object of its own; done again, by number, if a chunk had to come again."""
    for number in range(TRIES):
        before = _came_again(members)
        found = measure(number)
        if _came_again(members) == before:
            break
    return found


def _came_again(members: Sequence[Mounted]) -> list[float]:
    return [member.mount.metrics()[f"trimsfs_{name}_total"] for member in members for name in _AGAIN]


def read_together(
    members: Sequence[Member], name: str, expected: Path, meanwhile: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Have a program on each of some members read a file at the same time, and do something *meanwhile*; what each saw.

    Fails if one gets another byte than *expected* has, or an error.
    """
    with ExitStack() as stack:
        readers = [
            stack.enter_context(Child("fleet.reader", "once", member.mount.path / name, expected=expected))
            for member in members
        ]
        begin(readers)
        meanwhile()
        outcomes = [reader.outcome(READ_S) for reader in readers]
    assert [outcome["wrong"] for outcome in outcomes] == [0] * len(members)
    return outcomes


@contextmanager
def reading(member: Member, expected: Path, seed: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """A program on a member that reads files until what this gives is called, which returns what it saw."""
    with Child("fleet.reader", "forever", member.mount.path, expected=expected, seed=seed) as reader:
        begin([reader])

        def end() -> dict[str, Any]:
            reader.tell()
            return reader.outcome(READ_S)

        yield end
