"""A keeper that anybody of its user asks to let them serve: it admits launchers, or refuses, and keeps nothing."""

import array
import gc
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mountctl.keeper.launching import launcher_socket, launchers
from mountctl.keeper.launching.launcher_socket import KEPT, PROTOCOL
from mountctl.keeper.launching.launchers import JOIN_TIMEOUT_S, Launcher, Launchers
from tests.support.keeper_in_process import DESCRIPTORS
from tests.support.messages import JOIN, near_misses

changes = st.dictionaries(st.sampled_from(sorted(JOIN)), st.none() | st.integers() | st.text(max_size=9), max_size=2)
messages = (
    changes.map(lambda changed: json.dumps(JOIN | changed).encode())
    | st.lists(st.sampled_from(KEPT), max_size=3).map(lambda names: json.dumps(JOIN | {"names": names}).encode())
    | near_misses.map(lambda message: json.dumps(message).encode())
    | st.binary(min_size=1, max_size=64)
    | st.just(b"x" * 20_000)
)


@contextmanager
def listening() -> Iterator[tuple[Launchers, Path]]:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as directory:
        path = Path(directory) / "run/x.servers"
        for module in (launchers, launcher_socket):
            patch.setattr(module, "launchers_path", lambda _: path)
        found = Launchers(Path("/models"))
        try:
            yield found, path
        finally:
            found.close()


def send(path: Path, data: bytes, kinds: list[str]) -> socket.socket:
    """Connect and send a message, with descriptors of these kinds."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(5)
    end.connect(str(path))
    descriptors = [DESCRIPTORS[kind]() for kind in kinds]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    end.sendmsg([data], rights)
    for descriptor in descriptors:
        os.close(descriptor)
    return end


def admitted(found: Launchers) -> Launcher | None:
    for _ in range(2):  # the connection, and the message
        found.poll(1)
    return found.take()


@example(json.dumps(JOIN | {"version": None, "protocol": 0}).encode(), [])
@given(messages, st.lists(st.sampled_from(sorted(DESCRIPTORS)), max_size=3))
@settings(deadline=None, max_examples=150)
def test_whoever_connects_joins_or_is_refused(data: bytes, kinds: list[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with listening() as (found, path):
        with send(path, data, kinds) as end:
            launcher = admitted(found)
            if launcher is not None:
                fields = json.loads(data)
                assert (fields["type"], fields["protocol"], fields["mountpoint"]) == ("join", PROTOCOL, "/models")
                assert sorted(launcher.held) == sorted(fields["names"])
                assert len(launcher.held) == len(kinds)
                assert not launcher.gone
                launcher.end("", "")
            answer = end.recv(16384)
            assert answer == b"" or json.loads(answer)["do"] == "end"
            assert launcher is None or launcher.gone
        assert found.take() is None
    assert len(os.listdir("/proc/self/fd")) <= before  # a garbage collection may close what other tests have left


def test_a_launcher_that_is_lost_before_its_turn_is_forgotten() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with listening() as (found, path):
        send(path, json.dumps(JOIN | {"names": ["fuse"]}).encode(), ["device"]).close()
        assert admitted(found) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_that_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as (found, path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.connect(str(path))
        found.poll(1)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + JOIN_TIMEOUT_S + 1)
        found.poll(0)
        assert end.recv(1) == b""


def test_of_two_that_join_the_one_that_kept_the_mount_goes_first() -> None:
    with listening() as (found, path):
        first = send(path, json.dumps(JOIN).encode(), [])
        second = send(path, json.dumps(JOIN | {"names": ["fuse"]}).encode(), ["device"])
        with first, second:
            assert found.wait(grace_s=5).held.keys() == {"fuse"}
            other = found.take()
            assert other is not None
            assert other.held == {}
            assert found.living()[0].held.keys() == {"fuse"}
            found.living()[0].end("", "")
            assert found.living() == [other]


@pytest.mark.parametrize(("pid", "killed"), [(0, []), (4711, [4711])])
def test_a_keeper_that_does_not_leave_is_killed_if_it_is_in_sight(
    pid: int, killed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kills: list[int] = []
    with listening():
        monkeypatch.setattr(launcher_socket, "peer", lambda _: (pid, 0))
        monkeypatch.setattr(launcher_socket, "stopped", lambda _: False)
        monkeypatch.setattr(os, "kill", lambda pid, _: kills.append(pid))
        launcher_socket.succeed(Path("/models"), timeout_s=0.1)
    assert kills == killed
