"""The soak, for a minute. ``make soak`` runs it for longer."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.reliability.soak import soak, table
from tests.support.survival import Survived


@pytest.mark.slow
def test_a_minute_of_everything_leaves_nothing_behind(tmp_path: Path, survived: Survived) -> None:
    outcome = soak(60, 1, tmp_path)
    Console(width=120).print(table(outcome))
    assert outcome.problems == []
    outcome.check(survived)
