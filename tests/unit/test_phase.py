"""The phases of a keeper: who follows a server that ends, and with what exit code the keeper ends."""

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import add
from typing import Any

import pytest

from mountctl.keeper.fuse_connection import Connection
from mountctl.keeper.keeper import Keeper
from mountctl.keeper.limits import HURRY_AFTER_S, SILENCE_LIMIT_S, STOP_TIMEOUT_S, TICK_S
from mountctl.keeper.phase import Phase
from mountctl.keeper.servers import server_source
from mountctl.keeper.servers.forked_server import ForkedServer
from tests.support.keeper_in_process import ORDER, FakeServer, keeper_in_process
from trimsfs.handover.keeper_client import Promotion, stand_by

STANDING_BY = b'{"type": "standing-by", "ledger": "2"}'
FORKS = b'{"type": "standing-by", "ledger": "2", "forks": true}'
MOUNT = b'{"type": "mount"}'
ALIVE = b'{"type": "alive"}'
RESENDS, DOES_NOT_RESEND = (b'{"type": "ready", "resends": %s}' % value for value in (b"true", b"false"))


class Scene:
    """A keeper, the servers that it has started, and a FUSE connection that can be ended."""

    def __init__(self, keeper: Keeper, first: FakeServer, unmount: Callable[[], None]) -> None:
        self.keeper, self.servers, self.unmount = keeper, [first], unmount

    def start(self, order: dict[str, Any], *, spare: bool, alone: bool) -> FakeServer:
        """What the keeper calls to start a server."""
        self.servers.append(FakeServer(order, spare=spare, alone=alone))
        return self.servers[-1]

    @property
    def phase(self) -> Phase:
        return self.keeper._mount.phase

    def say(self, server: FakeServer, *messages: bytes) -> None:
        for message in messages:
            server.say(message, ["device"] if message == MOUNT else [])
            self.keeper._crew.dispatcher.receive(server)
            assert server.kills == 0

    def serve(self, ready: bytes = RESENDS) -> FakeServer:
        """Have the first server mount and be ready."""
        (first,) = self.servers
        self.say(first, STANDING_BY)
        self.keeper._tick()
        self.say(first, MOUNT, ready)
        return first

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the keeper replies at once to an operator."""
        replies: list[dict[str, Any]] = []
        self.keeper._on_request(request, replies.append)
        return replies[0] if replies else {}


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    read, write = os.pipe()
    with keeper_in_process([], lambda: write) as (keeper, first):
        made = Scene(
            keeper, first, lambda: os.close(read)
        )  # an error is polled then, as of a connection that has ended
        monkeypatch.setattr(server_source, "ServerProcess", made.start)
        yield made
        for server in made.servers:
            server.channel.close()
            server.end.close()


def test_until_a_server_is_ready_the_keeper_ends_with_it(scene: Scene) -> None:
    (first,) = scene.servers
    scene.say(first, STANDING_BY)
    scene.keeper._tick()
    scene.say(first, MOUNT)
    assert scene.phase is Phase.STARTING
    first.ended_with = 7
    scene.keeper._tick()
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 7)
    assert scene.servers == [first]


def test_a_standby_that_cannot_start_ends_a_keeper_that_never_served(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(order: dict[str, Any], *, spare: bool, alone: bool) -> None:
        raise FileNotFoundError(2, "No such file", order["server"][0])

    (first,) = scene.servers
    monkeypatch.setattr(server_source, "ServerProcess", fails)
    scene.keeper._crew.standby = None
    scene.keeper._tick()
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 1)
    assert first.kills == 0


def test_where_the_kernel_does_not_resend_the_keeper_ends_with_its_server(scene: Scene) -> None:
    first = scene.serve(DOES_NOT_RESEND)
    assert scene.phase is Phase.IRREPLACEABLE
    assert "before Linux 6.9" in scene.ask({"do": "replace"})["error"]
    first.ended_with = 3
    scene.keeper._tick()
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 3)


def test_a_server_that_ends_is_followed_by_the_standby(scene: Scene) -> None:
    first = scene.serve()
    assert scene.phase is Phase.REPLACEABLE
    scene.keeper._tick()
    _, standby = scene.servers
    scene.say(standby, STANDING_BY)
    first.ended_with = 137
    scene.keeper._tick()
    assert (scene.phase, scene.keeper._crew.active) == (Phase.REPLACEABLE, standby)
    scene.say(standby, RESENDS)
    assert scene.keeper._status()["restarts"] == 1


def test_a_server_that_forks_the_next_one_is_followed_by_it(scene: Scene) -> None:
    """The fork, of a process that the test plays, is known by its first message only; the next standby is loaded."""
    (first,) = scene.servers
    keeper = scene.keeper
    scene.say(first, FORKS)
    keeper._tick()
    promotion, end = promoted(first)
    scene.say(first, MOUNT, RESENDS)
    forked = keeper._crew.standby
    assert isinstance(forked, ForkedServer)
    keeper._tick()
    assert (keeper._crew.standby, len(scene.servers), forked.standing_by, forked.ended()) == (forked, 1, False, False)
    child = os.fork()
    if child == 0:
        os._exit(int(stand_by(end) is None))
    end.close()
    assert select.select([forked.channel], [], [], 20)[0]
    keeper._crew.dispatcher.receive(forked)
    assert (forked.pid, forked.standing_by, forked.ended()) == (child, True, False)
    first.ended_with = 137
    keeper._tick()
    assert (keeper._crew.active, keeper._crew.standby) == (forked, None)
    assert forked.wait(20)
    assert (forked.ended(), forked.exit_code) == (True, 0)
    forked.kill()  # which does nothing any more
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(forked._process._pidfd)  # type: ignore[attr-defined]
    forked.channel.close()
    close(promotion)


def test_a_fork_that_fails_is_replaced_by_a_standby_that_is_loaded(scene: Scene) -> None:
    (first,) = scene.servers
    scene.say(first, FORKS)
    scene.keeper._tick()
    promotion, end = promoted(first)
    end.close()
    scene.say(first, MOUNT, RESENDS)
    scene.keeper._tick()
    assert len(scene.servers) == 1
    scene.keeper._crew.restart_policy.reset_delay()
    scene.keeper._tick()
    assert (scene.keeper._crew.active, scene.keeper._crew.standby) == (first, scene.servers[1])
    close(promotion)


def test_the_fork_of_the_new_server_does_not_have_it_replaced_again(scene: Scene) -> None:
    first = scene.serve()
    scene.keeper._tick()
    assert scene.ask({"do": "replace"}) == {}
    scene.keeper._tick()
    new = scene.servers[-1]
    scene.say(new, FORKS)
    assert first.kills == 1
    first.ended_with = 137
    scene.keeper._tick()
    promotion, end = promoted(new)
    end.send(STANDING_BY)
    forked = scene.keeper._crew.standby
    assert isinstance(forked, ForkedServer)
    scene.keeper._crew.dispatcher.receive(forked)
    assert (scene.keeper._crew.active, new.kills) == (new, 0)
    end.close()
    forked.channel.close()
    close(promotion)


def promoted(server: FakeServer) -> tuple[Promotion, socket.socket]:
    """What a server is told that was promoted, and its end of the channel for the next one."""
    promotion = stand_by(server.end)
    server.channel.recv(1000)  # it has said before that it stands by
    assert promotion is not None
    assert promotion.standby is not None
    return promotion, socket.socket(fileno=promotion.standby)


def close(promotion: Promotion) -> None:
    """Close the descriptors of the mount that a server was given."""
    for descriptor in (promotion.ledger, promotion.lock, promotion.fuse):
        if descriptor is not None:
            os.close(descriptor)


def pass_time(scene: Scene, monkeypatch: pytest.MonkeyPatch, seconds: float, *, step_s: float = TICK_S) -> None:
    """Have the keeper tick for so long."""
    began = scene.keeper._ticked_at
    with monkeypatch.context() as clock:
        for tick in range(1, int(seconds / step_s) + 1):
            clock.setattr(time, "monotonic", partial(add, began, tick * step_s))
            scene.keeper._tick()


def test_a_server_that_is_silent_for_30_s_is_killed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scene.serve()
    pass_time(scene, monkeypatch, SILENCE_LIMIT_S - 1)
    assert first.kills == 0
    scene.say(first, ALIVE)
    pass_time(scene, monkeypatch, SILENCE_LIMIT_S - 1)
    assert first.kills == 0
    pass_time(scene, monkeypatch, 4)
    assert first.kills > 0


def test_a_server_is_not_killed_for_what_passed_while_the_keeper_itself_did_not_run(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scene.serve()
    pass_time(scene, monkeypatch, 100, step_s=40)
    assert first.kills == 0


def test_a_standby_takes_its_time_until_it_is_needed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scene.serve()
    scene.keeper._tick()
    _, standby = scene.servers
    assert (standby.spare, standby.hurries) == (True, 0)
    pass_time(scene, monkeypatch, HURRY_AFTER_S - 1)
    assert standby.hurries == 0
    pass_time(scene, monkeypatch, 3)
    assert standby.hurries > 0
    hurries = standby.hurries
    first.ended_with = 137
    scene.keeper._tick()
    assert standby.hurries > hurries


def test_the_standby_of_a_server_that_follows_a_dead_one_is_no_spare(scene: Scene) -> None:
    first = scene.serve()
    scene.keeper._tick()
    _, standby = scene.servers
    scene.say(standby, STANDING_BY)
    first.ended_with = 137
    scene.keeper._tick()
    scene.say(standby, RESENDS)
    scene.keeper._tick()
    assert [server.spare for server in scene.servers] == [False, True, False]


def test_a_server_starts_alone_where_no_other_serves(scene: Scene) -> None:
    first = scene.serve()
    scene.keeper._tick()
    _, standby = scene.servers
    first.ended_with = standby.ended_with = 137
    scene.keeper._tick()
    vars(scene.keeper._crew.restart_policy)["_not_before"] = 0.0
    scene.keeper._tick()
    assert [server.alone for server in scene.servers] == [False, False, True]


def test_a_server_that_an_operator_waits_for_is_no_spare(scene: Scene) -> None:
    scene.serve()
    scene.keeper._tick()
    scene.ask({"do": "replace", "order": dict(ORDER)})
    scene.keeper._tick()
    assert [server.spare for server in scene.servers] == [False, True, False]


def test_a_server_that_ends_after_the_unmount_is_not_followed(scene: Scene) -> None:
    first = scene.serve()
    scene.unmount()
    scene.keeper._tick()
    assert scene.phase is Phase.UNMOUNTED
    assert scene.servers == [first]  # none is started beside it
    assert "unmounted" in scene.ask({"do": "replace"})["error"]
    first.ended_with = 0
    scene.keeper._tick()
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 0)


def test_a_server_that_does_not_end_after_the_unmount_is_killed_once_and_no_failure(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scene.serve()
    scene.unmount()
    scene.keeper._tick()
    assert first.kills == 0
    pass_time(scene, monkeypatch, STOP_TIMEOUT_S + 3)
    assert (scene.phase, first.kills) == (Phase.OVERDUE, 1)
    first.ended_with = 137
    scene.keeper._tick()
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 0)


def test_unmounted_while_no_server_serves_the_next_one_ends_the_keeper(scene: Scene) -> None:
    first = scene.serve()
    first.ended_with = 137
    scene.keeper._tick()
    _, second = scene.servers
    scene.unmount()
    scene.keeper._tick()
    assert scene.phase is Phase.UNMOUNTED
    scene.say(second, STANDING_BY)
    scene.keeper._tick()
    second.ended_with = 0
    scene.keeper._tick()
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 0)


def test_a_keeper_that_is_told_to_stop_ends_whatever_its_phase(scene: Scene) -> None:
    scene.keeper._on_signals(bytes([signal.SIGCHLD]))
    assert scene.phase is Phase.STARTING
    scene.keeper._on_signals(bytes([signal.SIGTERM]))
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 0)


def test_a_server_that_becomes_ready_does_not_call_off_the_end(scene: Scene) -> None:
    (first,) = scene.servers
    scene.say(first, STANDING_BY)
    scene.keeper._tick()
    scene.say(first, MOUNT)
    scene.keeper._on_signals(bytes([signal.SIGTERM]))
    scene.say(first, RESENDS)
    assert scene.phase is Phase.ENDING
    scene.unmount()
    scene.keeper._mount.notice_unmount()
    assert (scene.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 0)


def test_servers_that_crash_again_and_again_end_the_keeper(scene: Scene) -> None:
    server = scene.serve()
    while scene.phase is Phase.REPLACEABLE:
        server.ended_with = 1
        scene.keeper._crew.restart_policy.reset_delay()
        scene.keeper._tick()
        server = scene.servers[-1]
        if scene.phase is Phase.REPLACEABLE and server is scene.keeper._crew.standby:
            scene.keeper._crew.restart_policy.reset_delay()
            scene.say(server, STANDING_BY)
            scene.keeper._tick()
    assert (scene.keeper._crew.restart_policy.restarts, scene.keeper._mount.exit_code) == (6, 1)


def test_the_mount_of_an_earlier_keeper_outlives_its_first_server(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "mounted", property(lambda _: True))
    monkeypatch.setattr(Connection, "gone", property(lambda _: False))
    later = Keeper({**scene.keeper._crew.replacement.order}, server_source.OwnServers(), None, {})
    try:
        assert later._mount.phase is Phase.REPLACEABLE
        later._tick()
        first = scene.servers[-1]
        first.ended_with = 1
        later._tick()
        later._crew.restart_policy.reset_delay()
        later._tick()
        assert (later._mount.phase, later._crew.standby) == (Phase.REPLACEABLE, scene.servers[-1])
        assert scene.servers[-1] is not first
    finally:
        later._mount.connection.close()
        later._selector.close()
