"""The reference model beside a server without FUSE, whose threads and clock are not real, and beside real mounts."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.reliability.machine import Machine
from tests.reliability.profiles import KNOWN_FAILURES, LONG, LONG_S, QUICK, survival
from tests.reliability.real import RealDriver
from tests.reliability.virtual import VirtualDriver
from tests.support.survival import Survived
from tests.support.tmpfs import tmpfs
from trimsfs.eviction_policies import POLICIES
from trimsfs.opening.cold_open import ColdOpen


class Virtual(Machine):
    directory: Path
    chunk_size: int
    numbers = itertools.count()
    hiccuping = False

    @initialize(
        cold_open=st.sampled_from(("auto", "wait", "stream")),
        streaming=st.booleans(),
        ttl_s=st.sampled_from((60.0, 1.0)),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def begin(self, cold_open: ColdOpen, streaming: bool, ttl_s: float, policy: str) -> None:
        self.virtual = VirtualDriver(
            self.directory / str(next(self.numbers)),
            self.chunk_size,
            cold_open=cold_open,
            streaming=streaming,
            ttl_s=ttl_s,
            policy=policy,
        )
        self.start(self.virtual)

    @precondition(lambda self: not self.model.failing)
    @rule()
    def hiccup(self) -> None:
        """The next request fails in a way that another attempt cures."""
        if not self.hiccuping:
            self.virtual.hiccup()
            self.model.hiccup(over=False)
            self.hiccuping = True

    @invariant()
    def hiccup_is_over(self) -> None:
        if self.hiccuping and not self.virtual.hiccuping:
            self.hiccuping = False
            self.model.hiccup(over=True)

    def teardown(self) -> None:
        super().teardown()
        self.totals.update(self.virtual.counted)


class Real(Machine):
    directory: Path
    numbers = itertools.count()

    @initialize(
        cold_open=st.sampled_from(("auto", "wait", "stream")),
        passthrough=st.sampled_from(("passthrough=yes", "passthrough=yes", "passthrough=no")),
    )
    def begin(self, cold_open: str, passthrough: str) -> None:
        directory = self.directory / str(next(self.numbers))
        self.start(RealDriver(directory, "--cold-open", cold_open, passthrough, most_restarts=2))


# By these functions, not by the classes, the sequences that were found are known.


def virtual() -> Virtual:
    return Virtual()


def real() -> Real:
    return Real()


@pytest.fixture
def directory(tmp_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place in memory for the caches of all servers without FUSE."""
    monkeypatch.setattr("trimsfs.tiers.disk.space.HEADROOM_CHUNKS", 1)
    with tmpfs(tmp_path / "memory", 1 << 30) as directory:
        monkeypatch.setattr(Virtual, "directory", directory, raising=False)
        monkeypatch.setattr(Virtual, "chunk_size", chunk_size, raising=False)
        yield


def profiles(quick: int, long: int) -> pytest.MarkDecorator:
    """So many examples in CI, and many more, at random, for long."""
    slow = [pytest.mark.slow, pytest.mark.timeout(LONG_S)]
    few, many = settings(QUICK, max_examples=quick), settings(LONG, max_examples=long)
    return pytest.mark.parametrize(
        "profile", [pytest.param(few, id="quick"), pytest.param(many, id="long", marks=slow)]
    )


@pytest.mark.usefixtures("directory")
@profiles(40, LONG.max_examples)
def test_a_server_does_as_the_model_says(profile: settings, survived: Survived) -> None:
    with survival(f"what {profile.max_examples} sequences of rules hold", Machine.totals, survived):
        run_state_machine_as_test(cast(type[Virtual], virtual), settings=profile)
    # The sequences came to where it matters; few of them may not.
    expected = ["evictions", "restarts", "replaced"]
    if profile.max_examples == LONG.max_examples:
        expected += ["corrupt", "refused", "ESTALE", "EFAULT"]
    assert [name for name in expected if not Machine.totals[name]] == []


@pytest.mark.usefixtures("directory")
def test_what_has_failed_before_does_not_fail_again() -> None:
    Machine.totals.clear()
    run_state_machine_as_test(cast(type[Virtual], virtual), settings=KNOWN_FAILURES)
    assert Machine.totals["restarts"] > 0


@profiles(3, LONG.max_examples // 15)
@pytest.mark.alone  # drops caches of the kernel
def test_a_mount_does_as_the_model_says(
    profile: settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: Survived
) -> None:
    """Few sequences, with all there is: kernel, processes and clock."""
    monkeypatch.setattr(Real, "directory", tmp_path, raising=False)
    with survival(f"what {profile.max_examples} sequences of rules hold, on mounts", Machine.totals, survived):
        run_state_machine_as_test(cast(type[Real], real), settings=profile)
