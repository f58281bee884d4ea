"""Requests that cannot be right are refused with the specification's codes, and touch nothing."""

import contextlib
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from mountctl.extras.csi import csi_pb2
from mountctl.extras.csi.csi_server import MESSAGE_LIMIT
from tests.csi.driver import (
    EPHEMERAL,
    Driver,
    models_mount,
    needs_root,
    node,
    publication,
    refused,
    running,
    volumes,
)
from trimsfs.mountinfo import Mount, mount_at, mounts

pytestmark = needs_root

INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNMET = grpc.StatusCode.FAILED_PRECONDITION
Request = csi_pb2.NodePublishVolumeRequest


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    directory = tmp_path_factory.mktemp("node")
    node(directory)
    (directory / "link").symlink_to(directory / "pods")
    (directory / "full").mkdir()
    (directory / "full/file").touch()
    (directory / "pods/pod").mkdir()
    with models_mount(directory), running(directory) as driver:
        yield driver


def target(text: str) -> Callable[[Request], None]:
    """Have the volume somewhere else; in braces, the directory of the node."""

    def change(request: Request) -> None:
        directory = Path(request.target_path).parents[2]
        request.target_path = text.format(directory)

    return change


def attribute(name: str, value: str) -> Callable[[Request], None]:
    return lambda request: request.volume_context.update({name: value})


def field(name: str, value: object) -> Callable[[Request], None]:
    return lambda request: setattr(request, name, value)


def mount_volume(name: str, value: str) -> Callable[[Request], None]:
    def change(request: Request) -> None:
        volume = request.volume_capability.mount
        volume.mount_flags.append(value) if name == "mount_flags" else setattr(volume, name, value)

    return change


def access_mode(number: int) -> Callable[[Request], None]:
    return lambda request: setattr(request.volume_capability.access_mode, "mode", number)


BAD: list[tuple[Callable[[Request], None], grpc.StatusCode, str]] = [
    (field("volume_id", ""), INVALID, "volume_id: is missing"),
    (field("volume_id", "v" * 129), INVALID, "128 bytes at most"),
    (field("volume_id", "é" * 65), INVALID, "128 bytes at most"),
    (field("volume_id", "a\nb"), INVALID, "control characters"),
    (target(""), INVALID, "target_path: is missing"),
    (target("pods/pod/mount"), INVALID, "absolute"),
    (target("/"), INVALID, "absolute"),
    (target("//"), INVALID, "absolute"),
    (target("/x"), INVALID, "absolute"),
    (target("/" + "/".join(["x" * 200] * 21)), INVALID, "longer than 4095"),
    (target("{}/pods/" + "x" * 256), INVALID, "absolute"),
    (target("{}/pods/../pods/mount"), INVALID, "'..'"),
    (target("{}/pods/./mount"), INVALID, "'..'"),
    (target("{}/pods//mount"), INVALID, "'//'"),
    (target("{}/pods/mount/.."), INVALID, "'..'"),
    (target("{}/pods/a\0b"), INVALID, "absolute"),
    (target("{}/pods/a\nb"), INVALID, "absolute"),
    (target("{}/link/mount"), INVALID, "symbolic link"),
    (target("{}/link"), UNMET, "is not a directory"),
    (target("{}/mounts/models"), INVALID, "holds the mounts themselves"),
    (target("{}/mounts/new"), INVALID, "holds the mounts themselves"),
    (target("{}/mounts/models/resnet50"), INVALID, "holds the mounts themselves"),
    (target("{}"), INVALID, "holds the mounts themselves"),
    (target("{}/pods/gone/mount"), UNMET, "/pods/gone does not exist: create it"),
    (target("{}/full"), UNMET, "is not empty"),
    (target("{}/full/file"), UNMET, "is not a directory"),
    (target("{}/full/file/mount"), UNMET, "is not a directory"),
    (target("/proc/self"), UNMET, "is not a directory"),
    (target("/dev/shm"), UNMET, "a tmpfs file system is mounted there"),
    (attribute("mount", ""), INVALID, "must be a name"),
    (attribute("mount", ".."), INVALID, "must be a name"),
    (attribute("mount", "../mounts/models"), INVALID, "must be a name"),
    (attribute("mount", "models/resnet50"), INVALID, "must be a name"),
    (attribute("mount", "/models"), INVALID, "must be a name"),
    (attribute("mount", "m" * 129), INVALID, "must be a name"),
    (attribute("mount", "other"), grpc.StatusCode.NOT_FOUND, "no such mount in"),
    (attribute("path", "/resnet50"), INVALID, "relative"),
    (attribute("path", ".."), INVALID, "relative"),
    (attribute("path", "../../store"), INVALID, "relative"),
    (attribute("path", "resnet50/../team"), INVALID, "relative"),
    (attribute("path", "resnet50/"), INVALID, "relative"),
    (attribute("path", "./resnet50"), INVALID, "relative"),
    (attribute("path", "team//bert"), INVALID, "relative"),
    (attribute("path", "resnet50\0"), INVALID, "relative"),
    (attribute("path", "resnet50\n2026 INFO all is well"), INVALID, "relative"),
    (attribute("path", "x" * 256), INVALID, "relative"),
    (attribute("path", "/".join(["x" * 200] * 6)), INVALID, "longer than 1024"),
    (attribute("path", ".trims"), INVALID, "is not a model"),
    (attribute("path", "resnet50/.trims/params"), INVALID, "is not a model"),
    (attribute("path", "resnet50/params"), INVALID, "is a file: give its directory"),
    (attribute("path", "resnet50/params/x"), INVALID, "is a file"),
    (attribute("path", "resnet51"), grpc.StatusCode.NOT_FOUND, "does not exist"),
    (attribute("Path", "resnet50"), INVALID, "unknown 'Path'"),
    (attribute("readOnly", "false"), INVALID, "unknown 'readOnly'"),
    (attribute(EPHEMERAL, "false"), UNMET, "SINGLE_NODE_WRITER: volumes are read-only: set accessModes"),
    (attribute(EPHEMERAL, "True"), UNMET, "SINGLE_NODE_WRITER: volumes are read-only: set accessModes"),
    (lambda request: request.volume_context.clear(), UNMET, "podInfoOnMount"),
    (lambda request: request.ClearField("volume_capability"), INVALID, "volume_capability: is missing"),
    (lambda request: request.volume_capability.ClearField("mount"), INVALID, "access_type is missing"),
    (lambda request: request.volume_capability.block.SetInParent(), UNMET, "no block volumes"),
    (access_mode(0), INVALID, "access_mode is missing"),
    (access_mode(4), UNMET, "MULTI_NODE_SINGLE_WRITER"),
    (access_mode(5), UNMET, "MULTI_NODE_MULTI_WRITER"),
    (access_mode(6), UNMET, "SINGLE_NODE_SINGLE_WRITER"),
    (access_mode(7), UNMET, "SINGLE_NODE_MULTI_WRITER"),
    (access_mode(99), UNMET, "access_mode 99"),
    (mount_volume("fs_type", "ext4"), UNMET, "leave it out"),
    (mount_volume("mount_flags", "rw"), UNMET, "volumes are nodev, nosuid, ro"),
    (mount_volume("mount_flags", "suid,dev"), UNMET, "volumes are"),
    (mount_volume("volume_mount_group", "1000"), UNMET, "--gid"),
]


def near(driver: Driver) -> list[Mount]:
    """All mounts but those of other tests."""
    return [
        mount
        for mount in mounts(None)
        if mount.mountpoint.is_relative_to(driver.pods.parent)
        or not mount.mountpoint.is_relative_to(tempfile.gettempdir())
    ]


@pytest.mark.parametrize(("change", "code", "words"), BAD, ids=[f"{number}" for number in range(len(BAD))])
def test_a_bad_publication_is_refused_and_leaves_nothing(
    change: Callable[[Request], None], code: grpc.StatusCode, words: str, driver: Driver
) -> None:
    request = publication(driver.pods / "pod/mount", "csi-a", {"path": "resnet50"})
    change(request)
    before = near(driver)

    with refused(code, words):
        driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)

    assert near(driver) == before
    assert os.listdir(driver.pods / "pod") == []
    assert os.listdir(driver.pods) == ["pod"]
    assert os.listdir(driver.pods.parent / "full") == ["file"]


def test_what_is_legal_of_the_same_fields_is_taken(driver: Driver) -> None:
    """Else the table above would show nothing."""
    request = publication(f"{driver.pods}/pod/mount/", "v" * 128, {"path": "team/bert", "mount": "models"})
    request.volume_capability.mount.fs_type = "trimsfs"
    request.volume_capability.mount.mount_flags.extend(["ro", "nosuid", "nodev"])
    request.volume_capability.access_mode.mode = csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY
    request.readonly = False
    request.secrets["password"] = "hidden"
    request.publish_context["any"] = "thing"
    driver.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
    assert (driver.pods / "pod/mount/model").read_bytes() == b"more weights"
    answer = csi_pb2.NodeUnpublishVolumeResponse
    undo = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v" * 128, target_path=request.target_path)
    driver.call("Node/NodeUnpublishVolume", undo, answer)
    assert volumes(driver.pods) == []


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("", INVALID, "target_path: is missing"),
        ("/", INVALID, "absolute"),
        ("/proc/../dev/shm", INVALID, "'..'"),
        ("/dev/shm", UNMET, "a tmpfs file system is mounted there"),
        ("{}/mounts/models", INVALID, "holds the mounts themselves"),
        ("{}/mounts", INVALID, "holds the mounts themselves"),
        ("{}/mounts/models/resnet50", INVALID, "holds the mounts themselves"),
        ("{}/link/pod", INVALID, "symbolic link"),
        ("{}/full", UNMET, "not empty"),
        ("{}/full/file", UNMET, "is not a directory"),
    ],
)
def test_only_volumes_are_unpublished(path: str, code: grpc.StatusCode, words: str, driver: Driver) -> None:
    text = path.format(driver.pods.parent)
    before = near(driver)
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="csi-a", target_path=text)

    with refused(code, words):
        driver.call("Node/NodeUnpublishVolume", request, csi_pb2.NodeUnpublishVolumeResponse)

    assert near(driver) == before
    assert mount_at(driver.pods.parent / "mounts/models") is not None
    assert (driver.pods.parent / "full/file").exists()
    with refused(INVALID, "volume_id: is missing"):
        request.volume_id = ""
        driver.call("Node/NodeUnpublishVolume", request, csi_pb2.NodeUnpublishVolumeResponse)


@pytest.mark.parametrize(
    ("volume", "path", "code", "words"),
    [
        *(("v", path, INVALID, "volume_path") for path in ("", "/mount", "{}/mounts/models", "{}/pods/../pods/pod")),
        ("", "/mount", INVALID, "volume_id: is missing"),
        ("v", "some/path", grpc.StatusCode.NOT_FOUND, "is not published"),
    ],
)
def test_stats_of_what_can_be_no_volume_are_refused(
    volume: str, path: str, code: grpc.StatusCode, words: str, driver: Driver
) -> None:
    request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=path.format(driver.pods.parent))
    with refused(code, words):
        driver.call("Node/NodeGetVolumeStats", request, csi_pb2.NodeGetVolumeStatsResponse)


def test_random_bytes_on_the_socket_do_no_harm(driver: Driver) -> None:
    source = random.Random(7)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    openings = (b"", preface, preface + b"\0\0\0\4\0\0\0\0\0", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01")
    for turn in range(200):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(driver.socket))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the driver has heard enough
                client.sendall(openings[turn % len(openings)] + source.randbytes(source.choice([1, 9, 300, 9000])))
    assert driver.process.poll() is None
    assert driver.ready()


def test_calls_that_are_no_messages_end_alone(driver: Driver) -> None:
    source = random.Random(8)

    def raw(method: str, data: bytes) -> bytes:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = driver.channel.unary_unary(f"/csi.v1.{method}")
        answer: bytes = call(data, timeout=10)
        return answer

    whole = publication(driver.pods / "pod/mount", "csi-a", {"path": "nothing"}).SerializeToString()
    errors = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(source.randint(1, 8)):
            data[source.randrange(len(data))] = source.randrange(256)
        try:
            raw("Node/NodePublishVolume", bytes(data))
        except grpc.RpcError:  # if only because there is no such model
            errors += 1
        else:  # it has become a request without the path of a model
            (published,) = volumes(driver.pods)
            undo = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v", target_path=str(published.mountpoint))
            driver.call("Node/NodeUnpublishVolume", undo, csi_pb2.NodeUnpublishVolumeResponse)
    assert errors > 200
    with refused(INVALID, "is not a NodePublishVolumeRequest"):
        raw("Node/NodePublishVolume", b"\xff" * 20)
    for absent in (
        "Node/NodeStageVolume",
        "Node/NodeUnstageVolume",
        "Node/NodeExpandVolume",
        "Controller/CreateVolume",
    ):
        with refused(grpc.StatusCode.UNIMPLEMENTED):
            raw(absent, b"")
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        raw("Node/NodePublishVolume", b"\0" * (MESSAGE_LIMIT + 1))
    assert volumes(driver.pods) == []
    assert driver.process.poll() is None
    assert driver.ready()
