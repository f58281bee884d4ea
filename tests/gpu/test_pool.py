"""Room on a GPU: what makes way, what never does, and what is told when there is none."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.scene import MIB, Scene, digest_of, scene
from tests.support.mounts import trimsfs, wait_until
from trimsfs.eviction_policies import POLICIES

NAMES = [f"net{number}.bin" for number in range(6)]
TINY = (20 * MIB, 20 * MIB)
"""Two copies and what is left free fit, a third does not."""


@pytest.fixture
def store(store_directory: Path) -> Path:
    for name in NAMES:
        (store_directory / name).write_bytes(random.Random(name).randbytes(6 * MIB))
    return store_directory


@pytest.fixture
def host(request: pytest.FixtureRequest, store: Path, tmp_path: Path) -> Iterator[Scene]:
    """A mount of the store, evicting by the policy that a test gives as the parameter ``host``."""
    with scene(store, tmp_path, f"eviction=gpu={getattr(request, 'param', 'lru')}", memory=TINY) as found:
        yield found


@pytest.mark.parametrize(
    "host",
    [
        name if name in {"lru", "lcu", "flush"} else pytest.param(name, marks=pytest.mark.slow)
        for name in POLICIES
        if name != "never"
    ],
    indirect=True,
)
def test_no_policy_takes_a_copy_that_is_in_use(host: Scene, store: Path) -> None:
    program = host.borrowing(NAMES[0])
    for name in NAMES[1:] * 2:
        descriptor = os.open(host.control_file(name), os.O_RDONLY)
        assert {copy["path"] for copy in host.copies()} >= {NAMES[0], name}
        assert host.kernel.devices[0].used <= 16 * MIB
        os.close(descriptor)
        wait_until(lambda: host.leases() == 1)

    assert host.counted("evictions_total") >= len(NAMES)
    assert program.digest() == digest_of(store, NAMES[0])


@pytest.mark.parametrize("host", ["never"], indirect=True)
def test_the_policy_never_lets_in_what_fits_and_no_more(host: Scene) -> None:
    for name in NAMES[:2]:
        host.load(name)
    assert host.refused(NAMES[2]) == errno.ENOMEM
    assert {copy["path"] for copy in host.copies()} == set(NAMES[:2])


def test_a_full_device_is_told_with_what_fills_it(host: Scene, store: Path) -> None:
    programs = [host.borrowing(name) for name in NAMES[:2]]
    assert host.refused(NAMES[2]) == errno.ENOMEM
    assert "no room for 6.3 MB" in host.mount.log()
    assert host.file(NAMES[2]).read_bytes() == (store / NAMES[2]).read_bytes()
    others = [host.borrowing(name, host.devices[1]) for name in NAMES[:2]]  # each device has its own room
    assert host.kernel.devices[0].used == host.kernel.devices[1].used == 12 * MIB
    programs[0].kill()
    wait_until(lambda: host.leases() == 1)
    assert host.borrowing(NAMES[2]).digest() == digest_of(store, NAMES[2])
    assert programs[1].digest() == others[1].digest() == digest_of(store, NAMES[1])


def test_memory_that_others_take_is_made_up_for_by_eviction_and_then_told(host: Scene, store: Path) -> None:
    host.load(NAMES[0])
    host.kernel.devices[0].others = 10 * MIB
    program = host.borrowing(NAMES[1])
    assert [copy["path"] for copy in host.copies()] == [NAMES[1]]
    host.kernel.devices[0].others = 13 * MIB
    assert host.refused(NAMES[2]) == errno.ENOMEM
    assert program.digest() == digest_of(store, NAMES[1])
    host.kernel.devices[0].others = 0
    assert host.borrowing(NAMES[2]).digest() == digest_of(store, NAMES[2])


def test_pinned_models_stay_on_the_device(host: Scene) -> None:
    assert trimsfs("pin", host.file(NAMES[0])).returncode == 0
    for name in NAMES:
        host.load(name)
    assert {copy["path"] for copy in host.copies()} == {NAMES[0], NAMES[-1]}
    assert trimsfs("unpin", host.file(NAMES[0])).returncode == 0
    for name in NAMES[1:3]:
        host.load(name)
    assert {copy["path"] for copy in host.copies()} == set(NAMES[1:3])
