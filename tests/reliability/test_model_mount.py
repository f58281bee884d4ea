"""The reference model beside a real mount, whose kernel, processes and clock are real: few, and each all there is."""

import itertools
from pathlib import Path
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from tests.reliability.machine import Machine
from tests.reliability.profiles import LONG, LONG_S, QUICK, survival
from tests.reliability.real import RealDriver
from tests.support.survival import Survived


class Real(Machine):
    """The machine on a mount of some configuration."""

    directory: Path
    numbers = itertools.count()

    @initialize(
        cold_open=st.sampled_from(("auto", "wait", "stream")),
        passthrough=st.sampled_from(("passthrough=yes", "passthrough=yes", "passthrough=no")),
    )
    def begin(self, cold_open: str, passthrough: str) -> None:
        directory = self.directory / str(next(self.numbers))
        self.start(RealDriver(directory, "--cold-open", cold_open, passthrough, most_restarts=2))


def real() -> Real:
    """By this function, not by the class, the sequences that were found are known."""
    return Real()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Real, "directory", tmp_path, raising=False)


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(settings(QUICK, max_examples=3), id="quick"),
        pytest.param(
            settings(LONG, max_examples=LONG.max_examples // 15),
            id="long",
            marks=[pytest.mark.slow, pytest.mark.timeout(LONG_S)],
        ),
    ],
)
@pytest.mark.alone  # drops caches of the kernel
def test_a_mount_does_as_the_model_says(profile: settings, survived: Survived) -> None:
    with survival(f"what {profile.max_examples} sequences of rules hold, on mounts", Machine.totals, survived):
        run_state_machine_as_test(cast(type[Real], real), settings=profile)
