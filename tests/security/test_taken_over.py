"""A server that has been taken over gets nothing of its keeper, of other servers or of the host."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mountctl.keeper.control_socket import ask
from mountctl.linux.sockets import socket_path
from tests.security import taken_over
from tests.security.names import check_log
from tests.support.keepers import have_serve
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.processes import family


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the mount, beside which servers that are taken over report."""
    directory = tmp_path_factory.mktemp("taken-over") / "store"
    directory.mkdir()
    (directory / "model").write_bytes(b"weights")
    return directory


@pytest.fixture(scope="module")
def mount(store: Path) -> Iterator[MountedStore]:
    """A mount whose server is taken over again and again."""
    with mounted(store, store.parent / "mount") as mount:
        assert (mount.path / "model").read_bytes() == b"weights"
        yield mount


def turn(mount: MountedStore, store: Path, act: str, victims: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Have the server taken over; what it says of its act."""
    report, told = store.parent / f"{act}.json", store.parent / "victims.json"
    told.write_text(json.dumps(victims or {}))
    have_serve(taken_over, mount, store, act, str(report), str(told))
    wait_until(lambda: report.exists() and report.read_bytes().endswith(b"\n"), 30)
    return [json.loads(line) for line in report.read_text().splitlines()]


def memory_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0])


def test_it_gets_nothing_of_its_keeper_of_other_servers_and_of_the_host(
    mount: MountedStore, store: Path, tmp_path: Path
) -> None:
    """Not even of those that run as the same user."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("to all")
    elsewhere.chmod(0o666)
    elsewhere.parent.chmod(0o777)
    (store / "out").symlink_to("/")
    beside = store.parent / "private/beside"  # as the store would be, below a directory for root alone
    beside.parent.mkdir(mode=0o700)
    beside.write_bytes(b"to all")
    with mounted(store, tmp_path / "other") as other:
        (store / "secret").write_bytes(b"for root")
        (store / "secret").chmod(0o600)
        facts = other.control()
        victims = {
            "pids": {
                "its keeper": mount.control()["keeper_pid"],
                "another keeper": facts["keeper_pid"],
                "another server": facts["server_pid"],
                "a program": os.getpid(),
            },
            "outside": ["/etc/shadow", str(socket_path(mount.path)), str(beside)],
            "unreadable": ["/etc/shadow", str(socket_path(mount.path)), str(store / "secret"), str(beside)],
            "unwritable": [str(elsewhere), str(other.cache / "index.sqlite"), str(socket_path(other.path))],
            "socket": str(socket_path(mount.path)),
        }
        (found,) = turn(mount, store, "attack", victims)
        assert Path(f"/proc/{facts['server_pid']}/status").read_text().count("60874") >= 8
        assert (other.path / "model").read_bytes() == b"weights"
    allowed = sorted(what for what, came in found.items() if came == "allowed")
    assert allowed == []
    assert len(found) >= 45
    assert elsewhere.read_text() == "to all"
    assert (mount.path / "model").read_bytes() == b"weights"
    assert (mount.path / "secret").read_bytes() == b"for root"


def test_it_cannot_use_its_keeper_up(mount: MountedStore, store: Path) -> None:
    """Neither by what is to be held for it nor by answers that it does not hear."""
    keeper = mount.control()["keeper_pid"]
    before, descriptors = memory_kib(keeper), len(os.listdir(f"/proc/{keeper}/fd"))
    (found,) = turn(mount, store, "hoard")
    assert found == {"held": 512, "error": "512 descriptors are held already"}
    assert len(os.listdir(f"/proc/{keeper}/fd")) <= descriptors + 520
    turn(mount, store, "flood")
    for _ in range(5):
        assert ask(mount.path, {"do": "status"}, timeout_s=5)["state"] == "serving"
    assert memory_kib(keeper) < before + 8192
    assert (mount.path / "model").read_bytes() == b"weights"


def test_it_is_ended_when_it_says_what_no_server_says(mount: MountedStore, store: Path) -> None:
    with (mount.path / "model").open("rb", buffering=0) as file:
        turn(mount, store, "babble")
        wait_until(lambda: "violated the protocol" in mount.log())
        wait_until(lambda: ask(mount.path, {"do": "status"}, timeout_s=5)["state"] == "serving")
        assert file.read() == b"weights"
    assert (mount.path / "model").read_bytes() == b"weights"


def test_what_it_has_its_keeper_log_forges_no_line(mount: MountedStore, store: Path) -> None:
    turn(mount, store, "complain")
    wait_until(lambda: "forged" in mount.log())
    check_log(mount.log())


def test_no_core_of_it_is_written(mount: MountedStore) -> None:
    """Nor of its keeper: both have credentials in memory. By a pipe, a limit of 0 would let one out."""
    for pid in family(mount.control()["keeper_pid"]):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"^Max core file size +1 +1 ", limits, re.MULTILINE), limits
