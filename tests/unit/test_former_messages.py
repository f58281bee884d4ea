"""Keeper, launcher and server understand those of the former release, by the messages that these were heard to say.

`tests.kubernetes.former_messages` has written them to tests/support/former_messages.json. Those of GPU copies are not
among them: no card was there. Each test is one side of a conversation, and says what the other side said then.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mountctl.keeper.launching import launchers
from mountctl.keeper.launching.launcher_socket import PROTOCOL
from mountctl.keeper.launching.launchers import Launchers
from mountctl.keeper.phase import Phase
from mountctl.linux import descriptor_passing
from tests.support.former_release import MESSAGES
from tests.support.keeper_in_process import DESCRIPTORS, keeper_in_process
from tests.support.mounts import wait_until
from tests.support.processes import family
from trimsfs.errors import TrimsError
from trimsfs.handover import ledger
from trimsfs.handover.keeper_client import KeeperClient, stand_by, tell_failure

Said = dict[str, Any]
CONVERSATIONS: list[list[Said]] = json.loads(MESSAGES.read_text())
TIMEOUT_S = 30
LAUNCHER = """
import json, sys
from pathlib import Path
from mountctl.keeper.launching import launcher
launcher.launchers_path = lambda _: Path(sys.argv[1])
sys.exit(launcher.launch(json.loads(sys.argv[2])))
"""
SERVER = ["/bin/sh", "-c", "exec sleep 60", "sh"]


def of_kind(field: str, kind: str) -> list[Said]:
    """All messages of a kind."""
    return [said for each in CONVERSATIONS for said in each if said["message"].get(field) == kind]


def with_servers() -> list[list[Said]]:
    """The conversations with servers; one that was never promoted has said that it stands by, and no more."""
    return [each for each in CONVERSATIONS if each[0]["message"].get("type") == "standing-by"]


def with_promoted() -> list[list[Said]]:
    """The conversations with servers that the keeper has promoted."""
    return [each for each in with_servers() if len(each) > 1]


@contextlib.contextmanager
def descriptors(kinds: list[str]) -> Iterator[list[int]]:
    """Descriptors of these kinds."""
    opened = [DESCRIPTORS[kind]() for kind in kinds]
    try:
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)


@pytest.mark.parametrize("conversation", with_servers())
def test_a_keeper_answers_servers_of_before_as_the_keeper_of_before_did(conversation: list[Said]) -> None:
    with keeper_in_process([]) as (keeper, server):
        server.end.settimeout(TIMEOUT_S)
        if any("fuse" in said["message"].get("descriptors", ()) for said in conversation):  # it takes a mount over
            keeper._mount.connection.mount(DESCRIPTORS["file"]())
            keeper._mount.phase = Phase.REPLACEABLE
        for said in conversation:
            message = said["message"]
            if not said["keeper"]:
                kind = "device" if message["type"] == "mount" else "file"
                server.say(json.dumps(message).encode(), [kind] * said["descriptors"])
                keeper._crew.dispatcher.receive(server)
                continue
            if "keeper_pid" in message:
                assert server.ledger_version == ledger.VERSION
                keeper._crew.promote(server)
            data, received, _, _ = socket.recv_fds(server.end, 1 << 16, 8)
            for descriptor in received:
                os.close(descriptor)
            answer = json.loads(data)
            assert answer.keys() >= message.keys()
            assert set(answer.get("descriptors", ())) == set(message.get("descriptors", ()))
            assert len(received) == said["descriptors"]
        if keeper._crew.standby is not server:
            keeper._crew.dismiss_standby()  # which a promoted server is to fork
        assert server.kills == 0  # as of one that violates the protocol
        server.end.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.end.recv(1)


@pytest.mark.parametrize("conversation", with_promoted())
async def test_a_server_says_what_a_keeper_of_before_knows_and_takes_its_answers(
    conversation: list[Said], autojump_clock: trio.testing.MockClock
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answers = [said for said in conversation if said["keeper"]]

    def answer(kind: str) -> None:
        """Have the keeper give the next answer, with descriptors of a kind; it comes before its question."""
        said = answers.pop(0)
        with descriptors([kind] * said["descriptors"]) as given:
            socket.send_fds(theirs, [json.dumps(said["message"]).encode()], given)

    async def heard(message: dict[str, Any]) -> None:
        """Wait until the server has said a message with the fields of this one."""
        while True:
            await trio.lowlevel.wait_readable(theirs)
            sent = json.loads(theirs.recv(1 << 16))
            if sent["type"] == message["type"]:
                assert sent.keys() == message.keys()
                return

    with ours, theirs:
        theirs.settimeout(TIMEOUT_S)
        answer("memory")
        first = conversation[0]["message"]
        promotion = stand_by(ours, forks=first.get("forks", False))
        assert promotion is not None
        for given in (promotion.ledger, promotion.lock, promotion.fuse, promotion.standby):
            if given is not None:
                os.close(given)
        client = KeeperClient(ours, pid=promotion.keeper_pid, backing_limit=promotion.backing_limit)
        with descriptors(["memory"]) as (file,), trio.fail_after(TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.run)
                for message in (said["message"] for said in conversation if not said["keeper"]):
                    match message:
                        case {"type": "mount"}:
                            answer("device")
                            os.close(await client.mount(file))
                        case {"type": "backing-open"}:
                            answer("memory")
                            assert await client.open(file) > 0
                        case {"type": "backing-close", "id": number}:
                            client.close(number)
                        case {"type": "ready", "resends": resends}:
                            await client.ready(resends=resends)
                        case {"type": "failed", "error": error}:
                            tell_failure(ours, TrimsError(error))
                    await heard(message)
                nursery.cancel_scope.cancel()
    assert answers == []


@pytest.mark.parametrize("said", of_kind("type", "join"))
def test_a_launcher_of_before_joins(said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.servers"
    monkeypatch.setattr(launchers, "launchers_path", lambda _: path)
    join = said["message"]
    assert join["protocol"] == PROTOCOL
    joined = Launchers(Path(join["mountpoint"]))
    try:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end,
            descriptors(["memory"] * said["descriptors"]) as held,
        ):
            end.connect(str(path))
            descriptor_passing.send(end, json.dumps(join).encode(), held)
            for _ in range(2):  # the connection, and the message
                joined.poll(TIMEOUT_S)
            launcher = joined.take()
            assert launcher is not None
            assert sorted(launcher.held) == sorted(join["names"])
    finally:
        joined.close()


@pytest.mark.parametrize("end", of_kind("do", "end"))
def test_a_launcher_obeys_a_keeper_of_before(end: Said, tmp_path: Path) -> None:
    order = {"mountpoint": "/models", "source": "s3://models", "allow_other": True, "server": SERVER}
    order |= {"options": {"cache_dir": "/cache", "log_file": "/log"}}
    path = tmp_path / "x.servers"
    (start, *_), (join, *_), keeps = of_kind("do", "start"), of_kind("type", "join"), of_kind("do", "keep")
    assert keeps
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(TIMEOUT_S)
        command = [sys.executable, "-c", LAUNCHER, str(path), json.dumps(order)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
            keeper, _ = listener.accept()
            with keeper:
                keeper.settimeout(TIMEOUT_S)
                assert json.loads(keeper.recv(1 << 16)).keys() >= join["message"].keys()
                for said in (start, *keeps, end):
                    with descriptors(["memory"] * said["descriptors"]) as sent:
                        socket.send_fds(keeper, [json.dumps(said["message"]).encode()], sent)
                    if said is start:
                        wait_until(lambda: len(family(launcher.pid)) == 2, TIMEOUT_S)
                _, errors = launcher.communicate(timeout=TIMEOUT_S)
    assert (launcher.returncode != 0) == bool(end["message"]["error"])
    assert end["message"]["error"] in errors
