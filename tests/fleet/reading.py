"""Programs on members that read together and compare what they get."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.children import Child
from tests.fleet.members import Member

READ_S = 60


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
        for reader in readers:
            reader.wait_ready()
        for reader in readers:
            reader.tell()
        meanwhile()
        outcomes = [reader.answer(READ_S) for reader in readers]
    assert [outcome["wrong"] for outcome in outcomes] == [0] * len(members)
    return outcomes


@contextmanager
def reading(member: Member, expected: Path, seed: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """A program on a member that reads files until what this gives is called, which returns what it saw."""
    with Child("fleet.reader", "forever", member.mount.path, expected=expected, seed=seed) as reader:
        reader.wait_ready()
        reader.tell()

        def end() -> dict[str, Any]:
            reader.tell()
            return reader.answer(READ_S)

        yield end
