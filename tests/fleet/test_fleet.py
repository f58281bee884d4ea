"""Three members, each with its own link, cache, nginx and mount: what they read, and what the store sends for it."""

import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.members import NAME, Fleet, Member
from tests.fleet.reading import new_object, read_together, undisturbed
from tests.support.mounts import again_while_copied, log_beside, trimsfs, wait_until
from trimsfs.fetch.bypass import HEAD_BYTES

MIB = 1 << 20
SIZE = 27 * MIB
"""Of an object: three chunks and a part of one."""


@pytest.fixture
def expected(fleet: Fleet, request: pytest.FixtureRequest) -> Path:
    """An object of the test's own, named by this file and in the store."""
    return new_object(fleet, request.node.name, SIZE)


def test_the_store_sends_an_object_once(fleet: Fleet) -> None:
    def sent(number: int) -> float:
        expected = new_object(fleet, f"once-{number}", SIZE)
        before = fleet.store.sent_bytes()
        read_together(fleet.members, expected.name, expected)
        return fleet.store.sent_bytes() - before

    heads = len(fleet.members) * HEAD_BYTES  # which do not wait for other members
    assert SIZE <= undisturbed(fleet.members, sent) < 1.02 * SIZE + heads


def test_a_host_that_comes_late_needs_no_store(fleet: Fleet, expected: Path) -> None:
    *early, late = fleet.members
    read_together(early, expected.name, expected)
    assert (late.mount.path / expected.name).stat().st_size == SIZE
    with fleet.store.host.unplugged():
        read_together([late], expected.name, expected)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_member_that_nobody_reaches_costs_no_error(fleet: Fleet, expected: Path, lost: int) -> None:
    others = [member for number, member in enumerate(fleet.members) if number != lost]
    with fleet.members[lost].host.unplugged():
        read_together(others, expected.name, expected)


def test_a_replaced_object_is_read_anew(fleet: Fleet, expected: Path) -> None:
    read_together(fleet.members, expected.name, expected)
    before = fleet.members[0].mount.info(expected.name)["etag"]
    expected.write_bytes(bytes(reversed(expected.read_bytes())))
    fleet.store.put({expected.name: expected.read_bytes()})
    for member in fleet.members:  # for up to 5 s, the one of before is there
        wait_until(lambda: member.mount.info(expected.name)["etag"] != before)  # noqa: B023
    read_together(fleet.members, expected.name, expected)


def test_a_stranger_gets_nothing(fleet: Fleet) -> None:
    """Without a certificate of the fleet's CA."""
    asked, asker = fleet.members[:2]
    context = ssl.create_default_context(cafile=fleet.authority.certificate)

    def ask() -> bytes:
        address = (asked.host.address, int(asked.entry.rpartition(":")[2]))
        with (
            socket.create_connection(address, timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=asked.host.address) as wrapped,
        ):
            wrapped.sendall(f"GET /c/{NAME}/{'0' * 64} HTTP/1.1\r\nHost: a\r\nRange: bytes=0-1\r\n\r\n".encode())
            return wrapped.recv(1024)

    assert b" 403 " in asker.host.namespace.call(ask).splitlines()[0]


def test_a_member_of_which_only_nginx_runs_is_passed_over(fleet: Fleet, expected: Path) -> None:
    lost, *others = fleet.members
    try:
        done = again_while_copied(lambda: trimsfs("umount", "--everywhere", lost.mount.path))
        assert done.returncode == 0, done.stderr
        before = after = [_told(member) for member in others]
        for number in range(10):  # until both have wanted one of its chunks
            fleet.store.put({f"{number}-{expected.name}": expected.read_bytes()})
            for member in others:
                wait_until((member.mount.path / f"{number}-{expected.name}").exists)
            read_together(others, f"{number}-{expected.name}", expected)
            after = [_told(member) for member in others]
            if all(told["metrics"]["trimsfs_fleet_failing_members"] for told in after):
                break
    finally:
        fleet.down(lost)
        fleet.up([lost])
    for told in after:
        problems = {member["address"]: member["problem"] for member in told["fleet"]["members"] if member["problem"]}
        assert list(problems) == [lost.entry]
        assert "no trimsfs server behind it" in problems[lost.entry]
        assert told["metrics"]["trimsfs_fleet_failing_members"] == 1
    busy = "trimsfs_fleet_busy_requests_total"
    assert [each["metrics"][busy] for each in after] == [each["metrics"][busy] for each in before]
    assert any("no trimsfs server behind it" in log_beside(each.directory).read_text() for each in others)


def _told(member: Member) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(trimsfs("status", "--json", member.mount.path).stdout)[0]
    return facts
