"""A keeper that follows a killed one: which server it takes the mount over from, and what it does if it cannot."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mountctl.keeper.fuse_connection import AlreadyKeptError, Connection, memory_of
from mountctl.keeper.keeper import Keeper
from mountctl.keeper.phase import Phase
from mountctl.keeper.servers import server_source
from mountctl.keeper.succession.predecessor import find_predecessor
from mountctl.linux import mounting
from mountctl.linux.mounting import MountIdentity
from tests.support.keeper_in_process import ORDER, FakeServer, keeper_in_process
from trimsfs.errors import NotMountedError, TakeoverError
from trimsfs.text import title

STANDING_BY = b'{"type": "standing-by", "ledger": "%s"}'
READY = b'{"type": "ready", "resends": true}'
NOBODY = 65534


class Scene:
    """A keeper that follows a killed one, the server that it finds, and those that it starts."""

    def __init__(self, keeper: Keeper, left: FakeServer) -> None:
        self.keeper, self.left, self.started = keeper, left, list[FakeServer]()

    def start(self, order: dict[str, object], *, spare: bool, alone: bool) -> FakeServer:
        self.started.append(FakeServer(order, spare=spare, alone=alone))
        return self.started[-1]

    def say(self, server: FakeServer, message: bytes) -> None:
        server.say(message)
        self.keeper._crew.dispatcher.receive(server)
        self.keeper._tick()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    left = FakeServer()
    left.ready_at, left.ledger_version = time.monotonic(), "2"
    read, write = os.pipe()
    with keeper_in_process([], lambda: write, left=left) as (keeper, _):
        made = Scene(keeper, left)
        monkeypatch.setattr(server_source, "ServerProcess", made.start)
        keeper._tick()
        yield made
        for server in made.started:
            server.channel.close()
            server.end.close()
    os.close(read)


def test_the_server_that_is_left_is_replaced_once_another_stands_by(scene: Scene) -> None:
    (new,) = scene.started
    assert (scene.left.kills, new.spare) == (0, False)
    scene.say(new, STANDING_BY % b"2")
    assert scene.left.kills == 1
    scene.left.ended_with = 137
    scene.keeper._tick()
    scene.say(new, READY)
    assert (scene.keeper._mount.phase, scene.keeper._crew.active) == (Phase.REPLACEABLE, new)
    assert scene.keeper._status()["last_end"] is None


@pytest.mark.parametrize("problem", ["another ledger", "ends", "fails"])
def test_a_server_that_cannot_be_replaced_is_left_as_it_is(problem: str, scene: Scene) -> None:
    (new,) = scene.started
    match problem:
        case "another ledger":
            scene.say(new, STANDING_BY % b"3")
        case "ends":
            new.ended_with = 1
            scene.keeper._tick()
        case "fails":
            scene.say(new, b'{"type": "failed", "kind": "ConfigurationError", "error": "no such user"}')
    assert (scene.keeper._mount.phase, scene.keeper._mount.exit_code) == (Phase.ENDING, 1)
    scene.keeper._clean_up()
    assert (scene.left.kills, scene.left.ended_with) == (0, None)
    assert scene.keeper._mount.connection.for_server().keys() == {"fuse", "ledger"}  # nothing was unmounted
    assert new.kills or problem == "ends"


def test_a_server_that_ends_meanwhile_is_followed_as_any_other(scene: Scene) -> None:
    scene.left.ended_with = 137
    scene.keeper._tick()
    (new,) = scene.started
    new.ended_with = 1
    scene.keeper._tick()
    assert scene.keeper._mount.phase is Phase.REPLACEABLE  # the keeper has the mount's only descriptors


def test_a_mount_has_one_keeper_at_a_time(tmp_path: Path) -> None:
    first = Connection(tmp_path, source="", allow_other=True)
    ledger = first.for_server()["ledger"]
    with pytest.raises(AlreadyKeptError):
        Connection(tmp_path, source="", allow_other=True, stored={"ledger": os.dup(ledger)})
    kept = os.dup(ledger)  # as a server has it
    first.close()
    second = Connection(tmp_path, source="", allow_other=True, stored={"ledger": kept})
    second.close()


# Which server is believed

PROCESS = """
import os, sys, time
from setproctitle import setproctitle
from mountctl.keeper.fuse_connection import memory_of
titles, uid, order = sys.argv[1:-2], sys.argv[-2], sys.argv[-1]
if uid:
    os.setuid(int(uid))
    os.dup2(memory_of(order.encode()), 0)
for above in titles[:-1]:
    if os.fork():
        setproctitle(above)
        time.sleep(60)
        os._exit(0)
setproctitle(titles[-1])
print(os.getpid(), flush=True)
time.sleep(60)
"""


@contextmanager
def process(order: int | None, *titles: str, uid: str = "", content: str = "") -> Iterator[int]:
    """A process with a title, and one above it for each that stands before; the pid of the last."""
    started = subprocess.Popen(
        [sys.executable, "-c", PROCESS, *titles, uid, content],
        stdin=subprocess.DEVNULL if order is None else order,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert started.stdout is not None
    try:
        yield int(started.stdout.readline())
    finally:
        os.killpg(started.pid, 9)
        started.wait(20)
        started.stdout.close()


@pytest.fixture
def mountpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mounting, "identify", lambda _: MountIdentity("0:99", None))
    return tmp_path / "models"


def text(mountpoint: Path) -> str:
    """An order as a keeper gives it to a server."""
    options = {"cache_dir": str(mountpoint.parent), "log_file": "/dev/null"}
    return json.dumps(ORDER | {"mountpoint": str(mountpoint), "options": options, "environment": {}})


def unsealed(mountpoint: Path) -> int:
    descriptor = os.memfd_create("trimsfs-order")
    os.write(descriptor, text(mountpoint).encode())
    return descriptor


def of_another_mount(mountpoint: Path) -> int:
    return memory_of(text(mountpoint / "other").encode())


def of_this_mount(mountpoint: Path) -> int:
    return memory_of(text(mountpoint).encode())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unsealed, "was not started by a keeper of this user"),
        (lambda _: os.open("/dev/null", os.O_RDONLY), "was not started by a keeper of this user"),
        (of_another_mount, "it serves another mount"),
        (of_this_mount, "does not have the descriptors of this mount"),
    ],
    ids=["an order that can be changed", "no order", "another mount's order", "nothing of this mount"],
)
def test_a_process_is_not_believed_that_it_serves_a_mount(
    make: Callable[[Path], int], message: str, mountpoint: Path
) -> None:
    order = make(mountpoint)
    try:
        with process(order, title("server", mountpoint)) as pid, pytest.raises(TakeoverError) as raised:
            find_predecessor(mountpoint)
    finally:
        os.close(order)
    assert f"pid {pid} (trimsfs server {mountpoint})" in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_order_that_another_user_has_made_is_not_followed(mountpoint: Path) -> None:
    with (
        process(None, title("server", mountpoint), uid=str(NOBODY), content=text(mountpoint)),
        pytest.raises(TakeoverError, match="was not started by a keeper of this user"),
    ):
        find_predecessor(mountpoint)


def test_a_keeper_that_lives_is_not_followed(mountpoint: Path) -> None:
    order = of_this_mount(mountpoint)
    titles = title("keeper", mountpoint), title("server", mountpoint)
    with (
        contextlib.closing(os.fdopen(order)),
        process(order, *titles) as pid,
        pytest.raises(TakeoverError, match=r"its keeper, pid \d+, is alive") as raised,
    ):
        find_predecessor(mountpoint)
    assert f"pid {pid} " in str(raised.value)


def test_without_a_server_there_is_nothing_to_follow(mountpoint: Path) -> None:
    with pytest.raises(NotMountedError, match="its server has ended as well") as raised:
        find_predecessor(mountpoint)
    assert "trimsfs umount" in str(raised.value)
