"""Room on a GPU: what makes way, what never does, and what is told when there is none."""

import errno
import os
import random
from pathlib import Path

import pytest

from tests.gpu.scene import MIB, digest_of, scene
from tests.support.mounts import trimsfs, wait_until
from trimsfs.eviction_policies import POLICIES

SIZE = 6 * MIB
NAMES = [f"net{number}.bin" for number in range(6)]
TINY = (20 * MIB, 20 * MIB)
"""Two copies and what is left free fit, a third does not."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    for name in NAMES:
        (store / name).write_bytes(random.Random(name).randbytes(SIZE))
    return store


@pytest.mark.parametrize(
    "policy",
    [
        name if name in {"lru", "lcu", "flush"} else pytest.param(name, marks=pytest.mark.slow)
        for name in POLICIES
        if name != "never"
    ],
)
def test_no_policy_takes_a_copy_that_is_in_use(store: Path, tmp_path: Path, policy: str) -> None:
    with scene(store, tmp_path, f"eviction=gpu={policy}", memory=TINY) as host:
        program = host.borrowing(NAMES[0])
        for name in NAMES[1:] * 2:
            descriptor = os.open(host.control_file(name), os.O_RDONLY)
            assert {copy["path"] for copy in host.copies()} >= {NAMES[0], name}
            assert host.kernel.devices[0].used <= 16 * MIB
            os.close(descriptor)
            wait_until(lambda: host.leases() == 1)

        assert host.counted("evictions_total") >= len(NAMES)
        assert program.digest() == digest_of(store, NAMES[0])


def test_the_policy_never_lets_in_what_fits_and_no_more(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, "eviction=gpu=never", memory=TINY) as host:
        for name in NAMES[:2]:
            os.close(os.open(host.control_file(name), os.O_RDONLY))
        with pytest.raises(OSError, match="Cannot allocate memory"):
            os.open(host.control_file(NAMES[2]), os.O_RDONLY)
        assert {copy["path"] for copy in host.copies()} == set(NAMES[:2])


def test_a_full_device_is_told_with_what_fills_it(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, memory=TINY) as host:
        programs = [host.borrowing(name) for name in NAMES[:2]]
        refused = host.program().ask("control_file", path=host.control_file(NAMES[2]))
        assert refused["errno"] == errno.ENOMEM
        assert "no room for 6.3 MB" in host.mount.log()
        assert host.file(NAMES[2]).read_bytes() == (store / NAMES[2]).read_bytes()
        programs[0].kill()
        wait_until(lambda: host.leases() == 1)
        assert host.borrowing(NAMES[2]).digest() == digest_of(store, NAMES[2])
        assert programs[1].digest() == digest_of(store, NAMES[1])


def test_memory_that_others_take_is_made_up_for_by_eviction_and_then_told(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, memory=TINY) as host:
        os.close(os.open(host.control_file(NAMES[0]), os.O_RDONLY))
        wait_until(lambda: host.leases() == 0)
        host.kernel.devices[0].others = 10 * MIB
        program = host.borrowing(NAMES[1])
        assert [copy["path"] for copy in host.copies()] == [NAMES[1]]
        host.kernel.devices[0].others = 13 * MIB
        refused = host.program().ask("control_file", path=host.control_file(NAMES[2]))
        assert refused["errno"] == errno.ENOMEM
        assert program.digest() == digest_of(store, NAMES[1])
        host.kernel.devices[0].others = 0
        assert host.borrowing(NAMES[2]).digest() == digest_of(store, NAMES[2])


def test_what_is_larger_than_its_share_of_the_device_is_refused(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, "gpu_memory=0.25", memory=TINY) as host:
        assert host.program().ask("control_file", path=host.control_file(NAMES[0]))["errno"] == errno.ENOMEM
        assert "raise gpu_memory" in host.mount.log()


def test_pinned_models_stay_on_the_device(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, memory=TINY) as host:
        assert trimsfs("pin", host.file(NAMES[0])).returncode == 0
        for name in NAMES:
            os.close(os.open(host.control_file(name), os.O_RDONLY))
            wait_until(lambda: host.leases() == 0)
        assert {copy["path"] for copy in host.copies()} == {NAMES[0], NAMES[-1]}
        assert trimsfs("unpin", host.file(NAMES[0])).returncode == 0
        for name in NAMES[1:3]:
            os.close(os.open(host.control_file(name), os.O_RDONLY))
            wait_until(lambda: host.leases() == 0)
        assert {copy["path"] for copy in host.copies()} == set(NAMES[1:3])


def test_evicting_a_model_takes_it_from_the_device_unless_it_is_in_use(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.borrowing(NAMES[0])
        refused = trimsfs("evict", host.file(NAMES[0]))
        assert refused.returncode == 12
        assert f"in use on {host.device}" in refused.stderr
        program.kill()
        wait_until(lambda: host.leases() == 0)
        assert trimsfs("evict", host.file(NAMES[0])).returncode == 0
        wait_until(lambda: host.kernel.devices[0].used == 0)


def test_each_device_has_its_own_room(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, memory=TINY) as host:
        second = host.kernel.devices[1].uuid
        programs = [host.borrowing(name) for name in NAMES[:2]]
        programs += [host.borrowing(name, second) for name in NAMES[:2]]
        assert [program.digest() for program in programs] == [digest_of(store, name) for name in NAMES[:2]] * 2
        assert host.kernel.devices[0].used == host.kernel.devices[1].used == 12 * MIB
        assert len(host.copies(1)) == 2
