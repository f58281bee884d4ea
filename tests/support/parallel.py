"""Tests in several processes, with pytest-xdist: which process runs which test, and tests that need the machine alone.

A pytest plugin; with one process it only puts the tests marked ``alone`` last.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController


class Machine:
    """Lets several processes use the machine together, or one alone, by locks on a file.

    The locks are POSIX record locks: processes that tests fork do not inherit them.
    """

    _TURN, _USE = 0, 1  # bytes of the file: who may lock next, and who uses the machine

    def __init__(self, file: Path) -> None:
        self._file = file.open("r+b")

    @contextmanager
    def used(self, *, alone: bool) -> Iterator[None]:
        """Use the machine for the length of the block. Others cannot overtake a process that waits to be alone."""
        self._lock(self._TURN, fcntl.LOCK_EX)
        try:
            self._lock(self._USE, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            self._lock(self._TURN, fcntl.LOCK_UN)
        try:
            yield
        finally:
            self._lock(self._USE, fcntl.LOCK_UN)

    def _lock(self, byte: int, how: int) -> None:
        fcntl.lockf(self._file, how, 1, byte)


class FilesInOrder(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each process the tests of one file after another, in the order in which they were collected.

    A file whose tests do not stand together, because some are marked ``alone``, is given out in parts.
    """

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)
        self._parts: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        if not self._parts:
            files = groupby(self.collection or (), lambda each: each.partition("::")[0])
            self._parts = {each: f"{file} {number}" for number, (file, part) in enumerate(files) for each in part}
        return self._parts[nodeid]


LOCK = pytest.StashKey[Path]()
MACHINE = pytest.StashKey[Machine]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the lock file in the process that starts the others, and open it in these."""
    if hasattr(config, "workerinput"):
        config.stash[MACHINE] = Machine(Path(config.workerinput["machine"]))
    elif config.getoption("dist", "no") != "no":
        file = tempfile.NamedTemporaryFile(prefix=f"trimsfs-tests-{os.getpid()}-")  # noqa: SIM115 - removed when pytest ends
        config.add_cleanup(file.close)
        config.stash[LOCK] = Path(file.name)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Tell another process where the lock file is."""
    node.workerinput["machine"] = str(node.config.stash[LOCK])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesInOrder | None:
    """Distribute tests by file, unless another way is asked for."""
    return FilesInOrder(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests last that need the machine alone."""
    items.sort(key=alone)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Wait until the machine can be used, before the time limit of the test begins."""
    machine = item.config.stash.get(MACHINE, None)
    if machine is None:
        return (yield)
    with machine.used(alone=alone(item)):
        return (yield)


def alone(item: pytest.Item) -> bool:
    """Whether a test needs the machine alone."""
    return item.get_closest_marker("alone") is not None
