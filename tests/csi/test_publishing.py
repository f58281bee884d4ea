"""Volumes as kubelet asks for them, of a real mount, by a driver in a process of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

import trimsfs
from mountctl.extras.csi import DRIVER_NAME, csi_pb2
from mountctl.extras.csi.bind_volume import BindError, bind
from tests.csi.driver import (
    NAMESPACE,
    Driver,
    models_mount,
    needs_root,
    newest,
    node,
    publication,
    refused,
    running,
    take_away,
    volumes,
)
from tests.support.mounts import trimsfs as trimsfs_command
from tests.support.mounts import wait_until
from tests.support.versions import in_directory, move, publish
from trimsfs.mountinfo import mount_at

pytestmark = needs_root


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A node with one mount."""
    path = tmp_path_factory.mktemp("node")
    node(path)
    with models_mount(path, "--metadata-ttl", "0.2", "--cache-size", "1GiB"):
        yield path


@pytest.fixture(scope="module")
def shared_driver(directory: Path) -> Iterator[Driver]:
    with running(directory) as driver:
        yield driver


@pytest.fixture
def driver(shared_driver: Driver) -> Iterator[Driver]:
    """The driver of the module; nothing is published at the start of a test."""
    yield shared_driver
    take_away(shared_driver.pods)


def test_driver_tells_what_it_is(driver: Driver) -> None:
    info = driver.call("Identity/GetPluginInfo", csi_pb2.GetPluginInfoRequest(), csi_pb2.GetPluginInfoResponse)
    assert (info.name, info.vendor_version) == (DRIVER_NAME, trimsfs.__version__)
    plugin = driver.call(
        "Identity/GetPluginCapabilities",
        csi_pb2.GetPluginCapabilitiesRequest(),
        csi_pb2.GetPluginCapabilitiesResponse,
    )
    assert not plugin.capabilities
    answer = driver.call(
        "Node/NodeGetCapabilities", csi_pb2.NodeGetCapabilitiesRequest(), csi_pb2.NodeGetCapabilitiesResponse
    )
    kinds = csi_pb2.NodeServiceCapability.RPC
    assert {found.rpc.type for found in answer.capabilities} == {kinds.GET_VOLUME_STATS, kinds.VOLUME_CONDITION}
    assert (
        driver.call("Node/NodeGetInfo", csi_pb2.NodeGetInfoRequest(), csi_pb2.NodeGetInfoResponse).node_id == "node-1"
    )
    assert driver.ready()


def test_pods_of_any_user_read_a_model_and_nobody_can_write(driver: Driver) -> None:
    target = driver.publish("a", path="resnet50")

    assert sorted(os.listdir(target)) == ["labels", "params"]
    assert (target / "params").read_bytes() == b"weights"
    # kubelet keeps others out of the directories above; in a container they are not above it.
    command = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "cat", "params"]
    assert subprocess.check_output(command, cwd=target, timeout=20) == b"weights"
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if f" {target} " in line)
    assert {"ro", "nosuid", "nodev"} <= set(line.split()[3].split(","))
    for write in ((target / "new").touch, (target / "params").unlink, lambda: (target / "params").write_bytes(b"")):
        with pytest.raises(OSError, match="Read-only file system"):
            write()

    driver.unpublish("a")

    assert not target.exists()
    assert target.parent.exists()
    assert (driver.pods.parent / "mounts/models/resnet50/params").read_bytes() == b"weights"


def test_without_a_path_the_volume_is_the_whole_mount(driver: Driver) -> None:
    target = driver.publish("a")
    assert sorted(os.listdir(target)) == ["resnet50", "team"]
    assert (target / "team/bert/model").read_bytes() == b"more weights"


def test_the_same_again_changes_nothing_and_something_else_is_refused(driver: Driver) -> None:
    target = driver.publish("a", path="resnet50")
    (before,) = volumes(driver.pods)

    assert driver.publish("a", path="resnet50", mount="models") == target

    assert volumes(driver.pods) == [before]
    for other in ("team", "resnet5", "resnet50/labels", ""):
        with refused(grpc.StatusCode.ALREADY_EXISTS, "unpublish it first"):
            driver.publish("a", path=other)
    assert volumes(driver.pods) == [before]
    driver.unpublish("a")
    driver.unpublish("a")
    assert volumes(driver.pods) == []
    assert driver.publish("a", path="team") == target


def test_what_was_never_published_is_unpublished_too(driver: Driver) -> None:
    target = driver.target("a")
    driver.unpublish("a")
    target.mkdir()
    driver.unpublish("a")
    assert not target.exists()
    gone = driver.pods / "gone/mount"
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v", target_path=str(gone))
    driver.call("Node/NodeUnpublishVolume", request, csi_pb2.NodeUnpublishVolumeResponse)


def test_calls_at_once_for_one_volume_are_done_one_after_the_other(driver: Driver) -> None:
    with ThreadPoolExecutor(max_workers=12) as threads:
        list(threads.map(lambda _: driver.publish("a", path="resnet50"), range(24)))
        (mount,) = volumes(driver.pods)
        assert mount.root == "/resnet50"

        def either(turn: int) -> None:
            driver.unpublish("a") if turn % 2 else driver.publish("a", path="resnet50")

        list(threads.map(either, range(36)))
    assert len(volumes(driver.pods)) <= 1
    target = driver.publish("a", path="resnet50")
    assert len(volumes(driver.pods)) == 1
    assert (target / "params").read_bytes() == b"weights"


def test_a_volume_of_an_alias_keeps_the_version_that_it_had_at_its_start(directory: Path, driver: Driver) -> None:
    put = in_directory(directory / "store")
    for version in ("v1", "v2"):
        publish(put, "llama", version, {"params": version.encode()})
    move(put, "llama", "prod", "v1")
    assert (
        trimsfs_command("refresh", directory / "mounts/models").returncode == 0
    )  # others may have asked for all names
    try:
        target = driver.publish("a", path="llama/prod")
        move(put, "llama", "prod", "v2")
        assert driver.publish("a", path="llama/prod") == target  # as the kubelet repeats it
        assert (target / "params").read_bytes() == b"v1"
        with refused(grpc.StatusCode.ALREADY_EXISTS, "unpublish it first"):
            driver.publish("a", path="llama/v2")
        wait_until(lambda: newest(directory / "mounts/models/llama/prod") == "v2")
        assert (driver.publish("b", path="llama/prod") / "params").read_bytes() == b"v2"
    finally:
        shutil.rmtree(directory / "store/llama")


def test_a_volume_in_use_goes_from_its_target_and_its_reader_goes_on(driver: Driver) -> None:
    target = driver.publish("a", path="resnet50")
    with (target / "params").open("rb", buffering=0) as file:
        driver.unpublish("a")
        assert not target.exists()
        assert file.read() == b"weights"


def test_volumes_are_read_only_whatever_the_mount_is_and_show_nothing_mounted_in_it(
    directory: Path, driver: Driver
) -> None:
    mount, team = directory / "mounts/models", directory / "mounts/models/team"
    subprocess.run(["mount", "-o", "remount,bind,rw,suid,dev", mount], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", team], check=True)
    try:
        (team / "secret").touch()
        target = driver.publish("a")
        assert os.listdir(target / "team") == ["bert"]
        assert {"ro", "nosuid", "nodev"} <= flags(target)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "leads out of the mount"):
            driver.publish("b", path="team")
    finally:
        subprocess.run(["umount", team], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro,nosuid,nodev", mount], check=True)


def flags(mountpoint: Path) -> set[str]:
    """What the mount itself forbids, whatever its file system does."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return set(next(line for line in lines if f" {mountpoint} " in line).split()[5].split(","))


def test_a_volume_in_a_volume_is_refused_without_a_look_at_it(driver: Driver) -> None:
    outer = driver.publish("a")
    for method, request, answer in (
        (
            "Node/NodePublishVolume",
            publication(outer / "team", "v", {"path": "resnet50"}),
            csi_pb2.NodePublishVolumeResponse,
        ),
        (
            "Node/NodeUnpublishVolume",
            csi_pb2.NodeUnpublishVolumeRequest(volume_id="v", target_path=str(outer / "team")),
            csi_pb2.NodeUnpublishVolumeResponse,
        ),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "lies on a trimsfs mount"):
            driver.call(method, request, answer)


def test_the_binding_of_another_mount_than_was_asked_for_is_given_up(directory: Path, driver: Driver) -> None:
    mount = mount_at(directory / "mounts/models")
    assert mount is not None
    driver.target("a").mkdir(exist_ok=True)
    order = {"mountpoint": str(mount.mountpoint), "path": "", "target": str(driver.target("a")), "replace": False}
    with pytest.raises(BindError, match="mount"):
        bind({**order, "number": mount.number + 1})
    assert volumes(driver.pods) == []
    bind({**order, "number": mount.number})
    assert len(volumes(driver.pods)) == 1


@pytest.mark.alone  # asks all mounts of the host
def test_volumes_are_no_mounts_to_those_who_look_at_mounts(directory: Path, driver: Driver) -> None:
    target = driver.publish("a", path="resnet50")
    for command in ("status", "ls"):
        shown = trimsfs_command(command).stdout
        assert str(directory / "mounts/models") in shown
        assert str(target) not in shown


def test_stats_are_of_the_space_for_local_copies(driver: Driver) -> None:
    target = driver.publish("a", path="resnet50")
    (target / "params").read_bytes()
    answer = driver.stats("a")
    usage, files = answer.usage
    assert (usage.unit, files.unit) == (csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES)
    assert usage.total == 1 << 30
    assert 0 < usage.used == usage.total - usage.available < 1 << 20
    assert 0 < files.used == files.total == os.statvfs(target).f_files
    assert files.available == 0
    assert not answer.volume_condition.abnormal
    with refused(grpc.StatusCode.NOT_FOUND, "is not published"):
        driver.stats("b")


def test_a_model_that_leaves_the_store_and_comes_back_is_the_same_volume(directory: Path, driver: Driver) -> None:
    store = directory / "store/passing"
    store.mkdir()
    (store / "params").write_bytes(b"old")
    seen = directory / "mounts/models/passing"
    wait_until(seen.exists)
    target = driver.publish("a", path="passing")
    assert (target / "params").read_bytes() == b"old"
    (store / "params").unlink()
    store.rmdir()
    wait_until(lambda: not seen.exists() and not os.listdir(target))

    driver.publish("a", path="passing")
    store.mkdir()
    (store / "params").write_bytes(b"new")

    wait_until(lambda: seen.exists() and (target / "params").read_bytes() == b"new", tolerate=FileNotFoundError)
    driver.publish("a", path="passing")
    assert len(volumes(driver.pods)) == 1


def test_a_volume_outlives_its_driver_and_the_next_one_knows_it(directory: Path, driver: Driver) -> None:
    with running(directory, socket=directory / "first.sock") as first:
        target = first.publish("a", path="resnet50")
    assert (target / "params").read_bytes() == b"weights"
    driver.publish("a", path="resnet50")
    assert len(volumes(driver.pods)) == 1
    assert not driver.stats("a").volume_condition.abnormal
    driver.unpublish("a")
    assert volumes(driver.pods) == []


def test_a_mount_is_chosen_by_its_name(directory: Path, driver: Driver) -> None:
    driver.publish("a", path="resnet50")
    (directory / "mounts/other").mkdir()
    try:
        target = driver.publish("a", path="resnet50")  # the kubelet does so again and again, to renew its token
        assert (target / "params").read_bytes() == b"weights"
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "mount is missing: choose one of models, other"):
            driver.publish("b", path="resnet50")
        with refused(grpc.StatusCode.UNAVAILABLE, "other is not mounted"):
            driver.publish("b", mount="other")
        assert not driver.ready()
        assert (driver.publish("b", mount="models", path="resnet50") / "params").read_bytes() == b"weights"
    finally:
        (directory / "mounts/other").rmdir()
    assert driver.ready()


def test_namespaces_have_what_the_tenants_file_allows(directory: Path) -> None:
    tenants = directory / "tenants.toml"
    tenants.write_text('[[tenant]]\nnamespaces = ["vision"]\npaths = ["resnet50"]\n')

    def publish(driver: Driver, namespace: str, path: str) -> None:
        request = publication(driver.target(namespace), f"csi-{namespace}", {"path": path}, namespace)
        driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)

    with running(directory, "--tenants", tenants, socket=directory / "tenants.sock") as driver:
        publish(driver, "vision", "resnet50")
        for namespace, path in (("vision", "team"), ("vision", ""), ("text", "resnet50")):
            with refused(grpc.StatusCode.PERMISSION_DENIED, "tenants file"):
                publish(driver, namespace, path)
        tenants.write_text('[[tenant]]\nnamespaces = ["te*"]\n')
        publish(driver, "text", "team/bert")
        tenants.write_text("[[tenant]]\n")
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "namespaces"):
            publish(driver, "text", "team/bert")
        request = publication(driver.target("none"), "csi-none", {})
        tenants.write_text('[[tenant]]\nnamespaces = ["*"]\n')
        del request.volume_context[NAMESPACE]
        with refused(grpc.StatusCode.PERMISSION_DENIED, "podInfoOnMount"):
            driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
