"""The checks of the Kubernetes CSI sanity suite (kubernetes-csi/csi-test, pkg/sanity) for what the driver has.

The suite is in Go and was not run: each check here is one of its own, by its name there. It leaves out, as it does by
itself, what a driver's capabilities exclude: all of the Controller, GroupController and SnapshotMetadata services,
staging, expansion, and the two checks of Node that create a volume by the Controller service, "should work" and "should
be idempotent". `test_publishing` and `test_persistent_volumes` make these calls for volumes that exist.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from mountctl.extras.csi import csi_pb2
from tests.csi.driver import Driver, models_mount, needs_root, node, persistent, refused, running, volumes

pytestmark = needs_root

INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
STAGE, EXPAND = 1, 3
"""Of NodeServiceCapability.RPC.Type."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    directory = tmp_path_factory.mktemp("node")
    node(directory)
    with models_mount(directory), running(directory) as driver:
        yield driver


def publish(driver: Driver, **fields: object) -> None:
    request = csi_pb2.NodePublishVolumeRequest(**fields)  # type: ignore[arg-type]
    driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)


def unpublish(driver: Driver, **fields: str) -> None:
    request = csi_pb2.NodeUnpublishVolumeRequest(**fields)
    driver.call("Node/NodeUnpublishVolume", request, csi_pb2.NodeUnpublishVolumeResponse)


def stats(driver: Driver, **fields: str) -> None:
    request = csi_pb2.NodeGetVolumeStatsRequest(**fields)
    driver.call("Node/NodeGetVolumeStats", request, csi_pb2.NodeGetVolumeStatsResponse)


def published(driver: Driver) -> Path:
    """A volume as the suite has one, with the handle "sanity"."""
    request = persistent(driver.target("sanity"), "sanity", {"path": "resnet50"})
    driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    return driver.target("sanity")


def plugin_capabilities(driver: Driver) -> None:
    answer = csi_pb2.GetPluginCapabilitiesResponse
    found = driver.call("Identity/GetPluginCapabilities", csi_pb2.GetPluginCapabilitiesRequest(), answer)
    kinds = csi_pb2.PluginCapability.Service
    known = {kinds.CONTROLLER_SERVICE, kinds.VOLUME_ACCESSIBILITY_CONSTRAINTS}
    assert {each.service.type for each in found.capabilities} <= known


def probe(driver: Driver) -> None:
    assert driver.ready() in {True, False}


def plugin_info(driver: Driver) -> None:
    found = driver.call("Identity/GetPluginInfo", csi_pb2.GetPluginInfoRequest(), csi_pb2.GetPluginInfoResponse)
    assert re.fullmatch(r"[a-zA-Z][A-Za-z0-9\-._]{0,61}[a-zA-Z]", found.name)


def capabilities(driver: Driver) -> set[int]:
    answer = csi_pb2.NodeGetCapabilitiesResponse
    found = driver.call("Node/NodeGetCapabilities", csi_pb2.NodeGetCapabilitiesRequest(), answer)
    return {each.rpc.type for each in found.capabilities}


def node_capabilities(driver: Driver) -> None:
    assert capabilities(driver) <= {*csi_pb2.NodeServiceCapability.RPC.Type.values()}


def node_info(driver: Driver) -> None:
    found = driver.call("Node/NodeGetInfo", csi_pb2.NodeGetInfoRequest(), csi_pb2.NodeGetInfoResponse)
    assert found.node_id
    assert found.max_volumes_per_node >= 0


def removes_target(driver: Driver) -> None:
    target = published(driver)
    assert target.is_dir()
    unpublish(driver, volume_id="sanity", target_path=str(target))
    assert not target.exists()


def refuses(call: Callable[..., None], code: grpc.StatusCode, **fields: object) -> Callable[[Driver], None]:
    def check(driver: Driver) -> None:
        with refused(code):
            call(driver, **fields)

    return check


def stats_elsewhere(driver: Driver) -> None:
    published(driver)
    refuses(stats, MISSING, volume_id="sanity", volume_path="some/path")(driver)


CHECKS: dict[str, Callable[[Driver], None]] = {
    "Identity GetPluginCapabilities should return appropriate capabilities": plugin_capabilities,
    "Identity Probe should return appropriate information": probe,
    "Identity GetPluginInfo should return appropriate information": plugin_info,
    "Node NodeGetCapabilities should return appropriate capabilities": node_capabilities,
    "Node NodeGetInfo should return appropriate values": node_info,
    "Node NodePublishVolume should fail when no volume id is provided": refuses(publish, INVALID),
    "Node NodePublishVolume should fail when no target path is provided": refuses(publish, INVALID, volume_id="v"),
    "Node NodePublishVolume should fail when no volume capability is provided": refuses(
        publish, INVALID, volume_id="v", target_path="/mnt/sanity/target"
    ),
    "Node NodeUnpublishVolume should fail when no volume id is provided": refuses(unpublish, INVALID),
    "Node NodeUnpublishVolume should fail when no target path is provided": refuses(unpublish, INVALID, volume_id="v"),
    "Node NodeUnpublishVolume should remove target path": removes_target,
    "Node NodeGetVolumeStats should fail when no volume id is provided": refuses(
        stats, INVALID, volume_path="some/path"
    ),
    "Node NodeGetVolumeStats should fail when no volume path is provided": refuses(stats, INVALID, volume_id="v"),
    "Node NodeGetVolumeStats should fail when volume is not found": refuses(
        stats, MISSING, volume_id="v", volume_path="some/path"
    ),
    "Node NodeGetVolumeStats should fail when volume does not exist on the specified path": stats_elsewhere,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=[*CHECKS])
def test_the_driver_passes_the_check_of_the_sanity_suite(check: Callable[[Driver], None], driver: Driver) -> None:
    check(driver)
    for each in volumes(driver.pods):
        unpublish(driver, volume_id="sanity", target_path=str(each.mountpoint))


@pytest.mark.parametrize("call", ["NodeStageVolume", "NodeUnstageVolume", "NodeExpandVolume"])
def test_what_the_suite_skips_the_driver_does_not_have(call: str, driver: Driver) -> None:
    assert not capabilities(driver) & {STAGE, EXPAND}
    with refused(UNIMPLEMENTED):
        driver.call(f"Node/{call}", csi_pb2.NodeGetInfoRequest(), csi_pb2.NodeGetInfoResponse)  # both are empty
