"""The driver beside a keeper and servers in containers of their own, which are lost and replaced under its volumes."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mountctl.extras.csi import csi_pb2
from tests.csi.driver import MODELS, Driver, is_dead, needs_root, persistent, publication, running, take_away, volumes
from tests.support.mounts import wait_until
from tests.support.nodes import Node, a_node, end

pytestmark = [needs_root, pytest.mark.alone, pytest.mark.slow]


@contextmanager
def node_with_driver(directory: Path) -> Iterator[tuple[Node, Driver]]:
    """A node whose server serves, and the driver for it."""
    (directory / "pods").mkdir()
    (directory / "mounts").symlink_to("shared")
    with a_node(directory, MODELS) as node:
        node.keeper()
        node.server()
        node.serving()
        try:
            with running(directory) as driver:
                yield node, driver
        finally:
            take_away(directory / "pods")


def publish(driver: Driver) -> list[Path]:
    """Publish an inline volume and a persistent one, as the kubelet does again and again."""
    kinds: dict[str, Callable[..., csi_pb2.NodePublishVolumeRequest]] = {"inline": publication, "pv": persistent}
    for pod, kind in kinds.items():
        request = kind(driver.target(pod), f"csi-{pod}", {"path": "resnet50"})
        driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    return [driver.target(pod) for pod in kinds]


def lose_the_server(node: Node) -> None:
    before = node.serving()
    end(node.processes[-1])
    node.server()
    node.serving(not_by=before)


def replace_the_server(node: Node) -> None:
    before, old = node.serving(), node.processes[-1]
    node.server("fetch_processes=1")
    node.serving(not_by=before)
    end(old)


def replace_the_keeper(node: Node) -> None:
    before, old = node.serving(), node.processes[0]
    old.send_signal(signal.SIGTERM)
    old.wait(30)
    new = node.keeper()
    node.serving(not_by=before, keeper=new.pid)


@pytest.mark.parametrize("change", [lose_the_server, replace_the_server, replace_the_keeper])
def test_volumes_are_as_before_when_they_are_published_again(change: Callable[[Node], None], tmp_path: Path) -> None:
    with node_with_driver(tmp_path) as (node, driver):
        targets = publish(driver)
        before = volumes(driver.pods)
        assert len(before) == 2
        with (targets[0] / "params").open("rb", buffering=0) as file:
            change(node)
            assert file.read() == MODELS["resnet50/params"]
            assert publish(driver) == targets
        assert volumes(driver.pods) == before
        for pod, target in zip(("inline", "pv"), targets, strict=True):
            assert (target / "labels").read_bytes() == MODELS["resnet50/labels"]
            answer = driver.stats(pod)
            assert (answer.volume_condition.abnormal, answer.usage[0].total > 0) == (False, True)
        assert driver.ready()


def test_volumes_are_replaced_when_keeper_and_server_were_lost_together(tmp_path: Path) -> None:
    with node_with_driver(tmp_path) as (node, driver):
        publish(driver)
        before = {volume.device for volume in volumes(driver.pods)}
        for process in node.processes:
            end(process)
        wait_until(lambda: is_dead(node.mountpoint))
        assert driver.stats("pv").volume_condition.abnormal
        assert not driver.ready()
        node.keeper()
        node.server()
        node.serving()
        targets = publish(driver)
        assert not before & {volume.device for volume in volumes(driver.pods)}
        assert [(target / "params").read_bytes() for target in targets] == [MODELS["resnet50/params"]] * 2
        assert not driver.stats("pv").volume_condition.abnormal
