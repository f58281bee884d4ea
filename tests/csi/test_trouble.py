"""Mounts that are slow, hang or are gone; sockets that are taken."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest

from mountctl.extras.csi.csi_requests import POD
from mountctl.extras.csi.csi_server import EndpointError, listen
from mountctl.extras.csi.mount_commands import MountCommands, Space
from mountctl.extras.csi.mounts_directory import MountsDirectory
from mountctl.extras.csi.node_service import NodeService
from mountctl.extras.csi.status_errors import StatusError
from mountctl.linux import mounting
from tests.csi.driver import (
    kill_together,
    models_mount,
    needs_root,
    node,
    publication,
    refused,
    running,
    take_away,
    volumes,
)
from tests.support.keepers import hanging
from tests.support.mounts import MOUNTCTL, wait_until
from tests.support.users import STRANGER
from trimsfs.mountinfo import Mount

MOUNT = Mount(number=1, parent=1, mountpoint=Path("/mounts/models"), device="0:1", kind="fuse.trimsfs", source="s3://b")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    node(tmp_path)
    yield tmp_path
    take_away(tmp_path / "pods")


@needs_root
@pytest.mark.alone  # measures time
def test_a_mount_that_does_not_answer_holds_up_nobody(directory: Path) -> None:
    with models_mount(directory) as mount, running(directory) as driver:
        target = driver.publish("a", path="resnet50")
        with hanging(mount):
            started = time.monotonic()
            with ThreadPoolExecutor(max_workers=8) as threads:
                ready = threads.submit(driver.ready)
                stats = threads.submit(driver.stats, "a")
                publications = [threads.submit(driver.publish, f"pod{number}", path="team") for number in range(6)]
            assert time.monotonic() - started < 15
            assert not ready.result()
            condition = stats.result().volume_condition
            told = f"{mount.path} does not answer: see its log, or `mountctl restart {mount.path}`"
            assert (condition.abnormal, condition.message) == (True, told)
            for call in publications:
                with refused(grpc.StatusCode.UNAVAILABLE, "does not answer: see its log, or `mountctl restart"):
                    call.result()

            started = time.monotonic()
            driver.publish("a", path="resnet50")  # it is there
            driver.unpublish("a")
            assert time.monotonic() - started < 3
            assert not target.exists()
            assert not driver.target("pod0").exists()

        wait_until(driver.ready)
        assert (driver.publish("b", path="team") / "bert/model").read_bytes() == b"more weights"


@needs_root
def test_volumes_of_a_mount_that_is_made_anew_are_published_anew(directory: Path) -> None:
    with running(directory) as driver:
        with models_mount(directory) as mount:
            target, other = driver.publish("a", path="resnet50"), driver.publish("c", path="team")
            kill_together(mount.control()["keeper_pid"])
            wait_until(lambda: mounting.answers(mount.path, timeout_s=5) is False, timeout_s=60)
            assert not driver.ready()
            answer = driver.stats("a")
            assert answer.volume_condition.abnormal
            assert "its server has ended" in answer.volume_condition.message
            assert [usage.total for usage in answer.usage] == [0, 0], "the kubelet takes no answer without usage"
            with refused(grpc.StatusCode.UNAVAILABLE, "its server has ended"):
                driver.publish("b", path="resnet50")
            driver.unpublish("c")
            assert not other.exists()
            subprocess.run(["umount", "--lazy", mount.path], check=True, timeout=10)
            with refused(grpc.StatusCode.UNAVAILABLE, "is not mounted: mount it, or see its log"):
                driver.publish("b", path="resnet50")
            assert not driver.ready()
            with models_mount(directory):
                (dead,) = volumes(driver.pods)
                condition = driver.stats("a").volume_condition
                assert (condition.abnormal, "restart the containers" in condition.message) == (True, True)
                with pytest.raises(OSError, match="not connected"):
                    os.listdir(target)

                with refused(grpc.StatusCode.NOT_FOUND):  # what is there stays until something better is at hand
                    driver.publish("a", path="nothing")
                assert volumes(driver.pods) == [dead]
                driver.publish("a", path="resnet50")

                (live,) = volumes(driver.pods)
                assert live.device != dead.device
                assert (target / "params").read_bytes() == b"weights"
                wait_until(lambda: not driver.stats("a").volume_condition.abnormal, 30)
                assert not driver.stats("a").volume_condition.abnormal
                driver.unpublish("a")
        assert volumes(driver.pods) == []


class _SlowPaths(MountCommands):
    """The mount answers, but not for the path."""

    def check_answers(self, mount: Mount) -> Space:
        return Space(total=1, free=1, files=1)

    def run(
        self, mount: Mount, command: list[str | Path], timeout_s: float
    ) -> "subprocess.CompletedProcess[str] | None":
        return super().run(mount, ["sleep", "60"], 0.1)


@needs_root
def test_a_path_that_is_not_found_in_time_is_told_as_that(directory: Path) -> None:
    mounts, children = MountsDirectory(directory / "mounts"), _SlowPaths()
    with models_mount(directory):
        service = NodeService(node_id="n", mounts=mounts, children=children, tenants=None)
        with pytest.raises(StatusError, match="not found in 25 s") as caught:
            service.node_publish_volume(publication(directory / "pods/mount", "v", {"path": "resnet50"}))
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert not (directory / "pods/mount").exists()


def test_a_child_that_cannot_be_killed_is_left_and_its_mount_not_asked_until_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    children = MountCommands()
    monkeypatch.setattr(subprocess.Popen, "kill", lambda _: None)

    assert children.run(MOUNT, ["sleep", "1"], 0.1) is None
    with pytest.raises(StatusError, match="does not answer"):
        children.run(MOUNT, ["true"], 5)
    other = Mount(number=2, parent=1, mountpoint=Path("/m"), device="0:2", kind="fuse.trimsfs", source="s3://c")
    assert children.run(other, ["true"], 5) is not None

    def answers() -> bool:
        return children.run(MOUNT, ["true"], 5) is not None

    wait_until(answers, tolerate=StatusError)


def start(directory: Path, *options: str, endpoint: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a driver that cannot work."""
    endpoint = endpoint or f"unix://{directory}/csi.sock"
    command: list[str | Path] = [
        MOUNTCTL,
        "csi",
        "--endpoint",
        endpoint,
        "--node-id",
        "n",
        "--mounts-dir",
        directory / "mounts",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=20, check=False)


def test_who_may_not_listen_is_told_to_be_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    server = Mock(spec=grpc.Server, **{"add_insecure_port.side_effect": RuntimeError("UNKNOWN:Failed to add port")})
    with pytest.raises(EndpointError) as raised:
        listen(server, tmp_path / "csi.sock")
    assert str(raised.value) == f"--endpoint {tmp_path}/csi.sock: only root can listen there: run it as root"


@needs_root
def test_the_log_names_volume_and_pod_of_what_is_refused_and_only_what_was_unmounted(directory: Path) -> None:
    log: list[str] = []
    with models_mount(directory), running(directory, log=log) as driver:
        with refused(grpc.StatusCode.NOT_FOUND, "does not exist"):
            driver.publish("a", path="none", **{POD: "reader"})
        driver.unpublish("a")
        target = driver.publish("b", path="team")
        driver.unpublish("b")
        driver.unpublish("b")
        with refused(grpc.StatusCode.NOT_FOUND):
            driver.stats("b")
    lines = [line.split(" ", 2)[2].rstrip("\n") for line in log]
    missing = f"path 'none' of {directory}/mounts/models: does not exist: see `trimsfs ls`"
    assert f"WARNING NodePublishVolume: volume csi-a: pod default/reader: NOT_FOUND: {missing}" in lines
    assert [line for line in lines if "unmounted" in line] == [f"INFO volume csi-b: unmounted from {target}"]
    gone = f"volume csi-b: is not published at {str(target)!r}"
    assert f"WARNING NodeGetVolumeStats: volume csi-b: NOT_FOUND: {gone}" in lines


def test_a_socket_left_behind_is_replaced_and_one_in_use_is_not(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(directory / "csi.sock"))
    with running(directory) as driver:
        assert driver.socket.stat().st_mode & 0o777 == 0o600
        done = start(directory)
        assert (done.returncode, "another driver listens there" in done.stderr) == (1, True), done.stderr
        assert not driver.ready()  # it answers


def test_it_ends_whichever_of_its_threads_gets_the_signal(directory: Path) -> None:
    with running(directory) as driver:
        process = driver.process.pid
        other = max(int(task.name) for task in Path(f"/proc/{process}/task").iterdir())
        assert other != process
        assert ctypes.CDLL(None).tgkill(process, other, signal.SIGTERM) == 0
        assert driver.process.wait(timeout=15) == 0


def test_what_cannot_be_served_gives_one_line_and_its_exit_code(directory: Path) -> None:
    (directory / "file").touch()
    bad = directory / "tenants.toml"
    bad.write_text("tenant = 1")
    for code, words, done in (
        (1, "is not a socket", start(directory, endpoint=f"unix://{directory}/file")),
        (1, "does not exist: create it", start(directory, endpoint=f"unix://{directory}/none/csi.sock")),
        (2, "must be unix:///", start(directory, endpoint="tcp://0.0.0.0:1")),
        (2, "must be unix:///", start(directory, endpoint="unix:csi.sock")),
        (2, "must be unix:///", start(directory, endpoint=f"{directory}/csi.sock")),
        (2, "must be unix:///", start(directory, endpoint=f"unix://{directory}/")),
        (2, "longer than 107", start(directory, endpoint=f"unix:///{'x' * 107}")),
        (1, "--tokens-dir /proc/tokens: No such", start(directory, "--tokens-dir", "/proc/tokens")),
        (2, "--node-id", start(directory, "--node-id", "")),
        (2, "--mounts-dir", start(directory, "--mounts-dir", "/nonexistent")),
        (2, "--tenants", start(directory, "--tenants", str(bad))),
        (2, "--tenants", start(directory, "--tenants", "/nonexistent.toml")),
    ):
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
        assert done.stderr.count("\n") == 1
    assert (directory / "file").exists()


def test_without_the_extra_the_other_commands_work_and_this_one_names_it() -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        code = (
            "import sys; sys.modules |= dict.fromkeys(['grpc', 'google']); "
            f"from mountctl.commands.main import main; main({[*arguments]})"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)

    assert run("abort", "--help").returncode == 0
    assert run("csi", "--help").returncode == 0
    done = run("csi", "--endpoint", "unix:///x", "--node-id", "n")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install 'trimsfs[csi]'" in done.stderr


@pytest.mark.parametrize("told", ["", "{", "{}", "[]", '"options"'])
def test_a_server_that_tells_no_options_is_named(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    children = MountCommands()
    monkeypatch.setattr(children, "run", lambda *_: subprocess.CompletedProcess([], 0, told, ""))
    with pytest.raises(StatusError, match="/mounts/models: its server tells no options") as caught:
        children.options(MOUNT)
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE
