"""What an operator tells a member, and what the member tells."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mountctl.extras.fleet.nginx import Nginx
from tests.fleet.members import Fleet, Member
from tests.fleet.reading import new_object, read_together, undisturbed
from tests.support.mounts import mounted, trimsfs, wait_until
from trimsfs.cli.watch import status

MIB = 1 << 20
SIZE = 35 * MIB


def command(*arguments: str | Path) -> str:
    done = trimsfs(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(member: Member) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(command("status", "--json", member.mount.path))[0]
    return facts


def test_status_tells_of_the_fleet(fleet: Fleet) -> None:
    received, sent = (f"trimsfs_fleet_{name}_bytes_total" for name in ("received", "served_sent"))

    def moved(number: int) -> list[float]:
        expected = new_object(fleet, f"status-{number}", SIZE)
        before = [told(member)["metrics"] for member in fleet.members]
        read_together(fleet.members, expected.name, expected)
        served = sum(each[sent] for each in before) + 2 * SIZE
        with suppress(AssertionError):  # nginx reports later; what never comes is told below
            wait_until(lambda: sum(member.mount.metrics()[sent] for member in fleet.members) >= served)
        after = [told(member)["metrics"] for member in fleet.members]
        return [sum(each[name] for each in after) - sum(each[name] for each in before) for name in (received, sent)]

    assert undisturbed(fleet.members, moved) == [2 * SIZE, 2 * SIZE]
    facts = told(fleet.members[0])
    assert facts["fleet"]["me"] == fleet.members[0].entry
    assert [each["address"] for each in facts["fleet"]["members"]] == sorted(each.entry for each in fleet.members)
    assert f"{len(fleet.members)} members" in command("status", fleet.members[0].mount.path)


def test_status_tells_that_this_host_is_drained(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "FLEET_DIRECTORY", tmp_path)
    path = fleet.members[0].mount.path
    for drained in (True, False):
        Nginx(tmp_path).set_drained([path], drained=drained)
        assert ("drained: `mountctl" in CliRunner().invoke(status.status, [str(path)]).output) == drained


def test_a_model_is_spread_before_the_rush(fleet: Fleet) -> None:
    def sent(number: int) -> tuple[float, float]:
        expected = new_object(fleet, f"spread-{number}", SIZE)
        before = fleet.store.sent_bytes()
        assert "spread 1 file" in command("warm", "--fleet", fleet.members[0].mount.path / expected.name)
        spread = fleet.store.sent_bytes() - before
        read_together(fleet.members, expected.name, expected)
        return spread, fleet.store.sent_bytes() - before

    assert undisturbed(fleet.members, sent) == (SIZE, SIZE)


# From here on, others leave a member alone for a while.


def test_a_member_that_is_off_fetches_alone(fleet: Fleet) -> None:
    alone, *others = fleet.members

    def fetched(number: int) -> tuple[Path, float, float, float]:
        expected = new_object(fleet, f"off-{number}", SIZE)
        assert "the fleet is off here" in trimsfs("warm", "--fleet", alone.mount.path / expected.name).stderr
        before = fleet.store.sent_bytes()
        # Not by a reader: its first bytes may come besides, if the file takes long.
        assert trimsfs("warm", alone.mount.path / expected.name).returncode == 0
        warmed = fleet.store.sent_bytes() - before
        read_together([alone], expected.name, expected)
        return expected, before, warmed, fleet.store.sent_bytes() - before

    command("fleet", "off", alone.mount.path)
    try:
        assert not told(alone)["fleet"]["on"]
        assert "off" in command("status", alone.mount.path)
        expected, before, warmed, read = undisturbed([alone], fetched)
        assert warmed == read == SIZE
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
