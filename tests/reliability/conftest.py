"""The table of what was survived, at the end of the run."""

from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

from tests.reliability import Survival
from tests.unit.conftest import chunk_size

__all__ = ["chunk_size", "pytest_terminal_summary", "survived"]

SURVIVALS = pytest.StashKey[list[Survival]]()

Survived = Callable[[Survival], None]


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Survived:
    """Adds a line to the table, and checks it."""
    lines = request.config.stash.setdefault(SURVIVALS, [])

    def add(survival: Survival) -> None:
        lines.append(survival)
        survival.check()

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    survivals = config.stash.get(SURVIVALS, [])
    if not survivals:
        return
    table = Table("fault", "injected", "operations", "errors of readers", "wrong bytes", "recovery")
    for one in survivals:
        errors = ", ".join(f"{number} {name}" for name, number in sorted(one.errors.items())) or "0"
        recovery = "" if one.recovery_s is None else f"{one.recovery_s:.2f} s"
        table.add_row(one.fault, str(one.injected), str(one.operations), errors, str(one.wrong), recovery)
    terminalreporter.section("survived")
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.write(capture.get())
