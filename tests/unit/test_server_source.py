"""What a keeper relies on in a source of servers, whether it starts them itself or a launcher elsewhere does."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mountctl.keeper.fuse_connection import memory_of
from mountctl.keeper.launching import launchers
from mountctl.keeper.launching.launchers import Launchers
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.restart_policy import RestartPolicy
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.servers.server_source import Order, OwnServers, ServerSource
from tests.support.keeper_in_process import ORDER
from tests.support.mounts import wait_until
from trimsfs.exit_codes import exit_code
from trimsfs.processes import stopped

TIMEOUT_S = 30
LAUNCHER = """
import json, sys
from pathlib import Path
from mountctl.keeper.launching import launcher
launcher.launchers_path = lambda _: Path(sys.argv[1])
sys.exit(launcher.launch(json.loads(sys.argv[2])))
"""
SERVER = """
import json, socket, sys, time
end = socket.socket(fileno=int(sys.argv[2]))
order = json.load(sys.stdin)
end.send(b'{"type": "standing-by", "ledger": "2"}')
data, descriptors, _, _ = socket.recv_fds(end, 8192, 8)
names = json.loads(data)["descriptors"]
told = f"{order['mountpoint']} {dict(zip(names, [open(number).read() for number in descriptors]))}"
end.send(json.dumps({"type": "failed", "kind": "None", "error": told}).encode())
time.sleep(600)
"""
"""A server that answers its promotion with what it has got."""
STANDS_BY, CANNOT_BE_STARTED, ENDS = [sys.executable, "-c", SERVER], ["/nowhere/server"], ["/bin/false"]


@dataclass
class Scene:
    """A source, an order of servers from it, and what ends with the keeper's trust in it."""

    source: ServerSource
    order: Order
    launcher: "subprocess.Popen[str] | None" = None


@contextmanager
def own(order: Order, _directory: Path) -> Iterator[Scene]:
    yield Scene(OwnServers(), order)


@contextmanager
def launched(order: Order, directory: Path) -> Iterator[Scene]:
    path = directory / "run/x.servers"
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(launchers, "launchers_path", lambda _: path)
        source = Launchers(Path(order["mountpoint"]))
        stack.callback(source.close)
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, path, json.dumps(order)], cwd="/", stderr=subprocess.PIPE, text=True
        )
        stack.enter_context(launcher)
        stack.callback(launcher.terminate)
        yield Scene(source, source.wait(grace_s=0).order, launcher)


@pytest.fixture
def command() -> list[str]:
    return STANDS_BY


@pytest.fixture(params=[own, launched])
def scene(
    request: pytest.FixtureRequest, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    order = ORDER | {"server": command, "options": {"log_file": "/dev/null", "cache_dir": str(tmp_path)}}
    with request.param(order, tmp_path) as found:
        yield found


@contextmanager
def started(scene: Scene) -> Iterator[ServerProcess]:
    server = scene.source.start(scene.order, spare=False, alone=False)
    try:
        yield server
    finally:
        server.channel.close()
        server.kill()
        wait_until(server.reaped, TIMEOUT_S)


def said(server: ServerProcess) -> server_messages.Message | None:
    assert select.select([server.channel], [], [], TIMEOUT_S)[0]
    return server.receive()[0]


def test_a_server_stands_by_and_serves_with_what_it_is_given(scene: Scene) -> None:
    assert scene.source.can_start(scene.order)
    with started(scene) as server:
        assert server.order is scene.order
        assert said(server) == server_messages.StandingBy("2")
        assert not server.ended()
        assert (server.hang(0), stopped(server.pid)) == (None, False)
        ledger = memory_of(b"of the mount")
        server.promote({"ledger": ledger}, RestartPolicy(), unclaimed=[])
        os.close(ledger)
        assert said(server) == server_messages.Failed("None", "/nowhere {'ledger': 'of the mount'}")


def test_a_server_that_is_killed_has_ended_while_another_can_start(scene: Scene) -> None:
    with started(scene) as first:
        said(first)
        first.kill()
        wait_until(first.ended, TIMEOUT_S)
        assert scene.source.can_start(scene.order)
        with started(scene) as second:
            assert said(second) == server_messages.StandingBy("2")
            assert second.pid != first.pid


@pytest.mark.parametrize("command", [CANNOT_BE_STARTED, ENDS], ids=["cannot be started", "ends"])
def test_a_server_that_does_not_come_up_is_known(scene: Scene) -> None:
    try:
        with started(scene) as server:
            wait_until(server.ended, TIMEOUT_S)
            assert server.receive() == (None, [])
    except FileNotFoundError as error:
        assert error.filename == CANNOT_BE_STARTED[0]  # noqa: PT017 - a server that has ended says as much
    assert scene.source.can_start(scene.order)


def test_what_the_next_keeper_needs_stays_open_here(scene: Scene) -> None:
    descriptor = memory_of(b"ledger")
    with started(scene) as server:
        said(server)
        scene.source.keep(server, {"ledger": descriptor})
        scene.source.keep(server, {})
        scene.source.keep(None, {})
        assert os.read(descriptor, 10) == b"ledger"
    os.close(descriptor)


def test_a_source_of_which_nothing_new_is_known_asks_for_nothing(scene: Scene) -> None:
    source = scene.source
    assert (list(source.newcomers()), source.leave, source.problem(scene.order)) == ([], False, None)
    assert source.another() in (None, scene.order)


def test_after_a_refusal_whoever_is_told_ends_or_the_keeper_tries_again(scene: Scene) -> None:
    with started(scene) as server:
        said(server)
        told = scene.source.refuse(server, "TakeoverError", "no")
        assert told == "no"
        if scene.launcher is not None:
            _, errors = scene.launcher.communicate(timeout=TIMEOUT_S)
            assert (scene.launcher.returncode, errors) == (exit_code("TakeoverError"), "trimsfs: no\n")
            wait_until(server.ended, TIMEOUT_S)
    if scene.source.can_start(scene.order):
        with started(scene) as another:
            assert said(another) == server_messages.StandingBy("2")
    else:
        assert scene.source.elsewhere
        with pytest.raises(OSError, match="its launcher has ended"):
            scene.source.start(scene.order, spare=False, alone=False)
