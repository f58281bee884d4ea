"""What an operator tells a member, and what the member tells."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mountctl.fleet.nginx import Nginx
from tests.fleet.members import Fleet, Member
from tests.fleet.reading import read_together
from tests.support.mounts import mounted, trimsfs, wait_until
from trimsfs.cli import status

MIB = 1 << 20
SIZE = 35 * MIB


@pytest.fixture
def expected(fleet: Fleet, request: pytest.FixtureRequest) -> Path:
    """An object of the test's own, named by this file and in the store."""
    path = fleet.directory / f"{request.node.name}.bin"
    path.write_bytes(random.Random(request.node.name).randbytes(SIZE))
    fleet.store.put({path.name: path.read_bytes()})
    return path


def command(*arguments: str | Path) -> str:
    done = trimsfs(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(member: Member) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(command("status", "--json", member.mount.path))[0]
    return facts


def test_status_tells_of_the_fleet(fleet: Fleet, expected: Path) -> None:
    before = [told(member)["metrics"] for member in fleet.members]
    read_together(fleet.members, expected.name, expected)
    facts = told(fleet.members[0])
    assert facts["fleet"]["me"] == fleet.members[0].entry
    assert [each["address"] for each in facts["fleet"]["members"]] == sorted(each.entry for each in fleet.members)
    after = [told(member)["metrics"] for member in fleet.members]

    def moved(name: str) -> float:
        key = f"trimsfs_fleet_{name}_total"
        return float(sum(each[key] for each in after) - sum(each[key] for each in before))

    assert moved("received_bytes") == moved("served_sent_bytes") == 2 * SIZE
    assert f"{len(fleet.members)} members" in command("status", fleet.members[0].mount.path)


def test_status_tells_that_this_host_is_drained(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "FLEET_DIRECTORY", tmp_path)
    path = fleet.members[0].mount.path
    for drained in (True, False):
        Nginx(tmp_path).set_drained([path], drained=drained)
        assert ("drained: `mountctl" in CliRunner().invoke(status.status, [str(path)]).output) == drained


def test_a_model_is_spread_before_the_rush(fleet: Fleet, expected: Path) -> None:
    before = fleet.store.sent_bytes()
    assert "spread 1 file" in command("warm", "--fleet", fleet.members[0].mount.path / expected.name)
    assert fleet.store.sent_bytes() - before == SIZE
    read_together(fleet.members, expected.name, expected)
    assert fleet.store.sent_bytes() - before == SIZE


# From here on, others leave a member alone for a while.


def test_a_member_that_is_off_fetches_alone(fleet: Fleet, expected: Path) -> None:
    alone, *others = fleet.members
    command("fleet", "off", alone.mount.path)
    try:
        assert not told(alone)["fleet"]["on"]
        assert "the fleet is off here" in trimsfs("warm", "--fleet", alone.mount.path / expected.name).stderr
        assert "off" in command("status", alone.mount.path)
        before = fleet.store.sent_bytes()
        # Not by a reader: its first bytes may come besides, if the file takes long.
        assert trimsfs("warm", alone.mount.path / expected.name).returncode == 0
        assert fleet.store.sent_bytes() - before == SIZE
        read_together([alone], expected.name, expected)
        assert fleet.store.sent_bytes() - before == SIZE
        read_together(others, expected.name, expected)
        assert fleet.store.sent_bytes() - before >= 2 * SIZE
    finally:
        command("fleet", "on", alone.mount.path)
    assert told(alone)["fleet"]["on"]


def test_off_outlives_the_server(fleet: Fleet) -> None:
    member = fleet.members[0]
    command("fleet", "off", member.mount.path)
    try:
        before = member.mount.control()
        os.kill(before["server_pid"], signal.SIGKILL)
        wait_until(lambda: member.mount.control()["restarts"] > before["restarts"])
        assert not told(member)["fleet"]["on"]
    finally:
        command("fleet", "on", member.mount.path)


def test_commands_for_a_fleet_fail_on_another_mount(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_bytes(b"a")
    with mounted(tmp_path / "store", tmp_path) as mount:
        for arguments in (("fleet", "off", mount.path), ("warm", "--fleet", mount.path)):
            done = trimsfs(*arguments)
            assert done.returncode == 2
            assert f"trimsfs: {mount.path} belongs to no fleet" in done.stderr
