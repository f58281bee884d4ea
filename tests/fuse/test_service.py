"""A mount as a service: what systemd is told, and that a keeper that is killed is gone on with.

The test stands in for systemd, by the protocol of sd_notify(3).
"""

import contextlib
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountctl.keeper.control_socket import ask
from mountctl.linux import mounting
from tests.support.mounts import MOUNTCTL, TRIMSFS, again_while_copied, trimsfs, wait_until
from tests.support.processes import alive
from tests.support.service_manager import Manager
from trimsfs.mountinfo import mount_at

UNIT = Path(__file__).parents[2] / "packaging/systemd/trimsfs@.service"
EXPOSURE = {"trimsfs-server@.service": 29, "trimsfs-spawn@.service": 100}
"""The highest exposure, in tenths, that `systemd-analyze security` may give a unit; others mount, or look at mounts.

What is denied to a fork server is denied to its forks, which are then not what their callers are.
"""
EXPOSURE_OF_OTHERS = 55
CONTENT = random.Random(1).randbytes(5 << 20)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as manager:
        yield manager


@pytest.fixture
def service(store_directory: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The mount point of a declared mount, and the command of its service."""
    (store_directory / "model").write_bytes(CONTENT)
    declared = tmp_path / "mounts.d"
    declared.mkdir()
    mountpoint = tmp_path / "models"
    lines = [f'mountpoint = "{mountpoint}"', f'store = "{store_directory}"', f'cache_dir = "{tmp_path / "cache"}"']
    (declared / "models.toml").write_text("\n".join(lines))
    return mountpoint, [MOUNTCTL, "run", "models", "--mounts-dir", str(declared)]


def start(manager: Manager, command: list[str]) -> None:
    """Start the service, and wait until its manager has all that it stores."""
    manager.start(*command)
    manager.hear("READY=1")
    manager.hear("FDNAME=order")


def test_service_tells_that_it_is_ready_and_alive_and_stops(service: tuple[Path, list[str]], manager: Manager) -> None:
    mountpoint, command = service
    manager.start(*command)
    manager.hear("READY=1")
    assert (mountpoint / "model").read_bytes() == CONTENT
    manager.hear("WATCHDOG=1")
    manager.hear("FDNAME=order")
    assert set(manager.stored) == {"ledger", "fuse", "lock", "order"}
    assert manager.process is not None
    manager.process.send_signal(signal.SIGTERM)
    manager.hear("STOPPING=1")
    assert manager.process.wait(20) == 0
    assert mount_at(mountpoint) is None


def test_service_that_is_killed_goes_on_with_the_same_mount(service: tuple[Path, list[str]], manager: Manager) -> None:
    mountpoint, command = service
    start(manager, command)
    mount = mount_at(mountpoint)
    assert mount is not None
    assert f'"device": "{mount.device}"' in os.pread(manager.stored["order"], 1 << 16, 0).decode()
    with (mountpoint / "model").open("rb", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        device = os.fstat(file.fileno()).st_dev
        for number in range(3):
            manager.kill()
            manager.said.clear()
            if number == 1:  # it was killed between the removal of an order and the storing of the next
                os.close(manager.stored.pop("order"))
            reader = subprocess.Popen(["cat", mountpoint / "model"], stdout=subprocess.PIPE)
            time.sleep(0.3)
            assert reader.poll() is None, "a request waits for the next server"
            manager.start(*command)
            manager.hear("READY=1")
            assert reader.communicate(timeout=30)[0] == CONTENT
            assert os.pread(file.fileno(), len(CONTENT), 0) == CONTENT == mapping[:]
            assert (mountpoint / "model").read_bytes() == CONTENT
            assert (mountpoint / "model").stat().st_dev == device
        mapping.close()
    facts = ask(mountpoint, {"do": "status"}, timeout_s=5)
    assert facts["state"] == "serving"
    assert manager.process is not None
    assert facts["keeper_pid"] == manager.process.pid
    assert again_while_copied(lambda: trimsfs("umount", mountpoint)).returncode == 0
    assert manager.process.wait(20) == 0
    wait_until(lambda: not alive(facts["keeper_pid"]))


def test_a_mount_that_has_neither_keeper_nor_server_nor_stored_descriptors_is_mounted_anew(
    service: tuple[Path, list[str]], manager: Manager
) -> None:
    mountpoint, command = service
    start(manager, command)
    manager.kill()
    for descriptor in manager.stored.values():
        os.close(descriptor)
    manager.stored.clear()
    manager.said.clear()
    wait_until(lambda: mounting.answers(mountpoint, timeout_s=5) is False)
    manager.start(*command)
    manager.hear("READY=1")
    assert (mountpoint / "model").read_bytes() == CONTENT
    assert "mountctl: models: detached the mount of a keeper and a server that have ended\n" in manager.log()


def test_a_mount_whose_stored_connection_alone_is_gone_is_mounted_anew(
    service: tuple[Path, list[str]], manager: Manager
) -> None:
    mountpoint, command = service
    start(manager, command)
    manager.kill()
    os.close(manager.stored.pop("fuse"))
    assert trimsfs("umount", "--lazy", mountpoint).returncode == 0
    assert set(manager.stored) == {"ledger", "lock", "order"}  # of the mount that is gone
    manager.said.clear()
    manager.start(*command)
    manager.hear("READY=1")
    manager.said.clear()
    manager.hear("FDNAME=order")
    assert (mountpoint / "model").read_bytes() == CONTENT
    assert set(manager.stored) == {"ledger", "fuse", "lock", "order"}
    manager.kill()  # what is stored now is of this mount
    manager.said.clear()
    manager.start(*command)
    manager.hear("READY=1")
    assert (mountpoint / "model").read_bytes() == CONTENT


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", sorted(path.name for path in UNIT.parent.glob("*.service")))
def test_systemd_understands_the_units(name: str, tmp_path: Path) -> None:
    for each in UNIT.parent.glob("*.service"):  # one names another
        text = each.read_text().replace("/usr/local/bin/mountctl", MOUNTCTL).replace("/usr/local/bin/trimsfs", TRIMSFS)
        (tmp_path / each.name).write_text(text.replace("User=trimsfs", "User=daemon"))
    exposure = EXPOSURE.get(name, EXPOSURE_OF_OTHERS)
    for command in (["verify", "--man=no"], ["security", "--offline=true", f"--threshold={exposure}"]):
        done = subprocess.run(
            ["systemd-analyze", *command, tmp_path / name], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert command[0] == "security" or done.stderr == ""


@pytest.mark.parametrize(
    "name", ["trimsfs@.service", "trimsfs-server@.service", "trimsfs-keeper@.service", "trimsfs-exporter.service"]
)
def test_systemd_never_stops_trying(name: str) -> None:
    """What is waited for, as a store or an address, may take longer than the few starts that systemd allows."""
    settings = re.findall(r"^(\w+)=(.*)$", UNIT.with_name(name).read_text(), re.MULTILINE)
    assert {("Restart", "on-failure"), ("StartLimitIntervalSec", "0")} <= set(settings)


def test_containers_that_start_at_boot_wait_for_mounts() -> None:
    """They would have the empty directory below the mount."""
    before = re.findall(r"^Before=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert [name for line in before for name in line.split()] == ["docker.service", "podman-restart.service"]
