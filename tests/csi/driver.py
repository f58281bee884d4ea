"""A driver as a node runs it, the command ``mountctl csi``, and a client of its services."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.protobuf.message import Message

from mountctl.extras.csi import csi_pb2
from tests.support.mounts import MOUNTCTL, MountedStore, mounted, wait_until
from trimsfs.mountinfo import Mount, mounts

CALL_TIMEOUT_S = 30
EPHEMERAL = "csi.storage.k8s.io/ephemeral"
NAMESPACE = "csi.storage.k8s.io/pod.namespace"
MODELS = {"resnet50/params": b"weights", "resnet50/labels": b"cat\ndog\n", "team/bert/model": b"more weights"}

Answer = TypeVar("Answer", bound=Message)


def node(directory: Path) -> tuple[Path, Path]:
    """A store with MODELS and the directory for the mounts. All users may enter what is above."""
    for path in (directory, *directory.parents[:2]):
        path.chmod(0o755)
    store, mounts_dir = directory / "store", directory / "mounts"
    for name, content in MODELS.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(content)
    mounts_dir.mkdir()
    (directory / "pods").mkdir()
    return store, mounts_dir


@contextmanager
def models_mount(directory: Path, *options: str) -> Iterator[MountedStore]:
    """The node's store, mounted in its mounts directory; volumes that a test left behind go first."""
    cache = directory / "cache"
    options = ("--cache-dir", str(cache), *options)  # beside the mounts directory, not in it
    with mounted(directory / "store", directory / "mounts", *options) as mount:
        try:
            wait_until(lambda: mount.control()["store_problem"] is None, 30)
            yield MountedStore(mount.path, cache)
        finally:
            take_away(directory / "pods")


def kill_together(keeper: int) -> None:
    """Kill a keeper and its servers, as when their container is killed: none can go on for another."""
    children = [int(pid) for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()]
    for pid in (keeper, *children):
        os.kill(pid, signal.SIGSTOP)
    os.kill(keeper, signal.SIGKILL)
    for pid in children:
        with suppress(ProcessLookupError):  # it has ended with the keeper
            os.kill(pid, signal.SIGKILL)


def newest(alias: Path) -> str:
    """What an alias leads to for a process that has not followed it: each sees one target for its life."""
    return subprocess.run(["readlink", "-n", alias], capture_output=True, text=True, timeout=30, check=True).stdout


def take_away(pods: Path) -> None:
    """Unmount whatever is mounted in a directory."""
    while found := volumes(pods):
        subprocess.run(["umount", "--lazy", found[-1].mountpoint], check=True, timeout=10)


def volumes(pods: Path) -> list[Mount]:
    """The mounts of trimsfs in a directory."""
    return [mount for mount in mounts() if mount.mountpoint.is_relative_to(pods)]


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver that runs, and where it publishes."""

    process: "subprocess.Popen[str]"
    channel: grpc.Channel
    socket: Path
    pods: Path

    def call(self, method: str, request: Message, answer: type[Answer]) -> Answer:
        """One call, such as Node/NodeGetInfo. Raises grpc.RpcError."""
        call = self.channel.unary_unary(
            f"/csi.v1.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        found: Answer = call(request, timeout=CALL_TIMEOUT_S)
        return found

    def target(self, pod: str) -> Path:
        """Where kubelet would have a pod's volume; all but the last directory is there."""
        path = self.pods / pod / "volumes/kubernetes.io~csi/models/mount"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, pod: str, volume: str | None = None, **attributes: str) -> Path:
        """Publish a volume for a pod as kubelet does; where it is."""
        request = publication(self.target(pod), volume or f"csi-{pod}", attributes)
        self.call("Node/NodePublishVolume", request, csi_pb2.NodePublishVolumeResponse)
        return self.target(pod)

    def unpublish(self, pod: str) -> None:
        """Take a pod's volume away."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=f"csi-{pod}", target_path=str(self.target(pod)))
        self.call("Node/NodeUnpublishVolume", request, csi_pb2.NodeUnpublishVolumeResponse)

    def stats(self, pod: str) -> csi_pb2.NodeGetVolumeStatsResponse:
        """What the driver says of a pod's volume."""
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=f"csi-{pod}", volume_path=str(self.target(pod)))
        return self.call("Node/NodeGetVolumeStats", request, csi_pb2.NodeGetVolumeStatsResponse)

    def ready(self) -> bool:
        """What Probe says."""
        return self.call("Identity/Probe", csi_pb2.ProbeRequest(), csi_pb2.ProbeResponse).ready.value


def publication(
    target: Path | str, volume: str, attributes: Mapping[str, str], namespace: str = "default"
) -> csi_pb2.NodePublishVolumeRequest:
    """The request that kubelet makes of an inline volume."""
    capability = csi_pb2.VolumeCapability
    return csi_pb2.NodePublishVolumeRequest(
        volume_id=volume,
        target_path=str(target),
        volume_capability=capability(
            mount=capability.MountVolume(),
            access_mode=capability.AccessMode(mode=capability.AccessMode.SINGLE_NODE_WRITER),
        ),
        readonly=True,
        volume_context={EPHEMERAL: "true", NAMESPACE: namespace, **attributes},
    )


def persistent(target: Path | str, volume: str, attributes: Mapping[str, str]) -> csi_pb2.NodePublishVolumeRequest:
    """The request that kubelet makes of a PersistentVolume with this ``volumeHandle`` and ``volumeAttributes``."""
    request = publication(target, volume, {**attributes, EPHEMERAL: "false"})
    request.volume_capability.access_mode.mode = csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY
    return request


@contextmanager
def running(
    directory: Path,
    *options: str | Path,
    socket: Path | None = None,
    log: list[str] | None = None,
) -> Iterator[Driver]:
    """A driver for the mounts of a node; it ends with status 0 and leaves no socket. *log* gets its lines."""
    socket, pods = socket or directory / "csi.sock", directory / "pods"
    command = [MOUNTCTL, "csi", "--endpoint", f"unix://{socket}", "--node-id", "node-1"]
    process = subprocess.Popen(
        [*command, "--mounts-dir", directory / "mounts", *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    log = [] if log is None else log
    reader = threading.Thread(target=log.extend, args=[process.stderr])
    reader.start()
    try:
        wait_until(lambda: socket.exists() or process.poll() is not None, 30)
        assert process.poll() is None, log
        with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
            yield Driver(process, channel, socket, pods)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0, log
        assert not socket.exists()
        assert not [line for line in log if "Traceback" in line], log
    finally:
        process.kill()
        process.wait(timeout=15)
        reader.join(timeout=15)
        process.stderr.close()


@contextmanager
def refused(code: grpc.StatusCode, words: str = "") -> Iterator[None]:
    """The call in this block is refused with a code and one line that has these words."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    error = caught.value
    assert isinstance(error, grpc.Call)
    message = error.details() or ""
    assert (error.code(), words in message) == (code, True), (error.code(), message)
    assert "\n" not in message


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
