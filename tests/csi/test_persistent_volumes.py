"""Volumes of PersistentVolumes, provisioned statically, beside inline ones: published, shared and published again."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from mountctl.extras.csi import csi_pb2, node_service
from mountctl.extras.csi.mount_commands import MountCommands
from mountctl.extras.csi.mounts_directory import MountsDirectory
from mountctl.extras.csi.node_service import NodeService
from mountctl.extras.csi.status_errors import StatusError
from tests.csi.driver import (
    Driver,
    models_mount,
    needs_root,
    node,
    persistent,
    publication,
    refused,
    running,
    take_away,
    volumes,
)
from tests.support.keepers import kill, serving
from tests.support.mounts import MOUNTCTL, MountedStore, wait_until
from trimsfs.mountinfo import Mount

pytestmark = needs_root

Request = csi_pb2.NodePublishVolumeRequest
Kind = Callable[[Path, str, dict[str, str]], Request]
MODE = csi_pb2.VolumeCapability.AccessMode


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    node(tmp_path)
    yield tmp_path
    take_away(tmp_path / "pods")


@pytest.fixture(scope="module")
def module_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A driver of a node of its own, for tests that change nothing of it but the volumes of their pods."""
    directory = tmp_path_factory.mktemp("node")
    node(directory)
    with models_mount(directory), running(directory) as driver:
        yield driver


def publish(driver: Driver, pod: str, request: Request) -> Path:
    driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    return driver.target(pod)


def test_pods_of_a_node_share_a_persistent_volume_and_each_leaves_it_alone(directory: Path) -> None:
    with models_mount(directory), running(directory) as driver:
        pods = [f"pod{number}" for number in range(6)]
        requests = [persistent(driver.target(pod), "llama-prod", {"path": "resnet50"}) for pod in pods]
        with ThreadPoolExecutor(max_workers=6) as threads:
            targets = list(threads.map(publish, [driver] * 6, pods, requests))
        assert [(target / "params").read_bytes() for target in targets] == [b"weights"] * 6
        undo = csi_pb2.NodeUnpublishVolumeRequest(volume_id="llama-prod", target_path=str(targets[0]))
        driver.call("Node/NodeUnpublishVolume", undo, csi_pb2.NodeUnpublishVolumeResponse)
        assert not targets[0].exists()
        assert len(volumes(driver.pods)) == 5
        assert (targets[1] / "params").read_bytes() == b"weights"


class _SlowForOne(MountCommands):
    """The mount gives one target nothing until it is let."""

    def __init__(self, slow: str) -> None:
        super().__init__()
        self._slow = slow
        self.asked, self.let = threading.Event(), threading.Event()

    def run(
        self, mount: Mount, command: list[str | Path], timeout_s: float
    ) -> "subprocess.CompletedProcess[str] | None":
        if self._slow in str(command[-1]):
            self.asked.set()
            assert self.let.wait(20)
        return super().run(mount, command, timeout_s)


def test_a_pod_waits_for_a_call_for_its_own_target_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_service, "LOCK_TIMEOUT_S", 0.05)
    children = _SlowForOne("/pods/slow")
    with models_mount(directory):
        mounts = MountsDirectory(directory / "mounts")
        service = NodeService(node_id="n", mounts=mounts, children=children, tenants=None)
        slow, quick = (persistent(directory / "pods" / pod, "v", {"path": "resnet50"}) for pod in ("slow", "quick"))
        with ThreadPoolExecutor(max_workers=1) as threads:
            call = threads.submit(service.node_publish_volume, slow)
            assert children.asked.wait(20)
            service.node_publish_volume(quick)
            for again in (slow, persistent(slow.target_path, "another", {})):
                with pytest.raises(StatusError, match="still runs") as caught:
                    service.node_publish_volume(again)
                assert caught.value.code == grpc.StatusCode.ABORTED
            assert not call.done()
            children.let.set()
            call.result(timeout=30)
            service.node_publish_volume(slow)
        assert len(volumes(directory / "pods")) == 2


@pytest.mark.parametrize("mode", MODE.Mode.values())
def test_a_persistent_volume_is_for_readers_and_says_so(mode: "MODE.Mode", module_driver: Driver) -> None:
    name = MODE.Mode.Name(mode)
    request = persistent(module_driver.target(name), name, {"path": "resnet50"})
    request.volume_capability.access_mode.mode = mode
    if mode in {MODE.SINGLE_NODE_READER_ONLY, MODE.MULTI_NODE_READER_ONLY}:
        assert (publish(module_driver, name, request) / "params").read_bytes() == b"weights"
    elif mode == MODE.UNKNOWN:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "access_mode is missing"):
            publish(module_driver, name, request)
    else:
        with refused(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"access_mode {name}: volumes are read-only: set accessModes: [ReadOnlyMany]",
        ):
            publish(module_driver, name, request)


def _kill_the_server(mount: MountedStore) -> None:
    kill(mount)


def _upgrade(mount: MountedStore) -> None:
    before = serving(mount)
    subprocess.run([MOUNTCTL, "upgrade", mount.path], check=True, timeout=60)
    serving(mount, not_by=before)


def _replace_the_keeper(mount: MountedStore) -> None:
    os.kill(mount.control()["keeper_pid"], signal.SIGKILL)
    wait_until(lambda: mount.control()["keeper_pid"] is None)
    subprocess.run([MOUNTCTL, "recover", mount.path], check=True, timeout=60)


@pytest.mark.parametrize("change", [_kill_the_server, _upgrade, _replace_the_keeper])
def test_a_volume_outlives_servers_and_keepers_and_is_published_again_as_it_is(
    change: Callable[[MountedStore], None], directory: Path
) -> None:
    with models_mount(directory) as mount, running(directory) as driver:
        requests: list[tuple[str, Kind]] = [("inline", publication), ("persistent", persistent)]
        made = {pod: kind(driver.target(pod), f"csi-{pod}", {"path": "resnet50"}) for pod, kind in requests}
        targets = [publish(driver, pod, request) for pod, request in made.items()]
        before = volumes(driver.pods)
        with (targets[1] / "params").open("rb", buffering=0) as file:
            change(mount)
            assert file.read() == b"weights"
        for (pod, request), target in zip(made.items(), targets, strict=True):
            assert publish(driver, pod, request) == target
            assert (target / "params").read_bytes() == b"weights"
            answer = driver.stats(pod)
            assert not answer.volume_condition.abnormal
            assert {usage.unit: usage.total > 0 for usage in answer.usage} == {1: True, 2: True}
        assert volumes(driver.pods) == before
        assert driver.ready()
