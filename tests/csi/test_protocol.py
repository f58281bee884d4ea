"""The messages are those of csi.proto, and csi.proto speaks as callers do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from mountctl.extras.csi import csi_pb2

HERE = Path(csi_pb2.__file__).parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What protoc makes of csi.proto now."""
    directory = tmp_path_factory.mktemp("protocol")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", f"--pyi_out={directory}"]
    subprocess.run([*command, f"--descriptor_set_out={directory}/csi.binpb", "csi.proto"], check=True, timeout=60)
    return directory


def test_the_descriptor_is_that_of_csi_proto(compiled: Path) -> None:
    ours, new = (
        descriptor_pb2.FileDescriptorSet.FromString((directory / "csi.binpb").read_bytes())
        for directory in (HERE, compiled)
    )
    assert ours == new, "run `make protocol`"


def test_the_types_are_those_of_csi_proto(compiled: Path) -> None:
    def names(file: Path) -> list[str]:
        """All that a stub declares; protoc's wording of it differs from version to version."""
        nodes = ast.walk(ast.parse(file.read_text()))
        return sorted(
            node.name if isinstance(node, ast.ClassDef) else ast.unparse(node.target)
            for node in nodes
            if isinstance(node, ast.ClassDef | ast.AnnAssign)
        )

    assert names(HERE / "csi_pb2.pyi") == names(compiled / "csi_pb2.pyi"), "run `make protocol`"


def test_a_request_has_the_bytes_that_the_specification_gives_it() -> None:
    """Written out by hand: field number and wire type, length, content."""
    capability = csi_pb2.VolumeCapability
    request = csi_pb2.NodePublishVolumeRequest(
        volume_id="v",
        target_path="/t",
        volume_capability=capability(
            mount=capability.MountVolume(fs_type="x"),
            access_mode=capability.AccessMode(mode=capability.AccessMode.SINGLE_NODE_WRITER),
        ),
        readonly=True,
        volume_context={"a": "b"},
    )
    mount, mode = b"\x12\x03\x0a\x01x", b"\x1a\x02\x08\x01"
    assert request.SerializeToString(deterministic=True) == b"".join(
        [b"\x0a\x01v", b"\x22\x02/t", b"\x2a\x09" + mount + mode, b"\x30\x01", b"\x42\x06\x0a\x01a\x12\x01b"]
    )
    stats = csi_pb2.NodeGetVolumeStatsResponse(
        usage=[csi_pb2.VolumeUsage(available=1, total=3, used=2, unit=csi_pb2.VolumeUsage.BYTES)],
        volume_condition=csi_pb2.VolumeCondition(abnormal=True, message="m"),
    )
    usage, condition = b"\x08\x01\x10\x03\x18\x02\x20\x01", b"\x08\x01\x12\x01m"
    assert stats.SerializeToString() == b"\x0a\x08" + usage + b"\x12\x05" + condition
    kinds = csi_pb2.NodeServiceCapability.RPC
    assert (kinds.GET_VOLUME_STATS, kinds.VOLUME_CONDITION) == (2, 4)
    ready = csi_pb2.ProbeResponse.FromString(b"\x0a\x02\x08\x01")
    assert ready.ready.value
