"""What the command line makes of GPUs: names of commands, and lines for people."""

import os
from pathlib import Path
from typing import Any

import pytest

from trimsfs.cli import gpu
from trimsfs.cli.diagnosis.checks import Advice
from trimsfs.cli.gpu import lines, warming
from trimsfs.control import metrics
from trimsfs.errors import ConfigurationError, DeviceError
from trimsfs.extras.gpu import gpu_checks
from trimsfs.options import GPU_OFF, MountOptions

UUID, OTHER = (f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in "12")
TEXT = f"""
# TYPE trimsfs_gpu_device_loads_total counter
trimsfs_gpu_device_loads_total{{device="{UUID}"}} 3.0
trimsfs_gpu_device_loads_total{{device="{OTHER}"}} 4.0
# TYPE trimsfs_disk_tenant_used_bytes gauge
trimsfs_disk_tenant_used_bytes{{tenant="a"}} 5.0
# TYPE trimsfs_disk_used_bytes gauge
trimsfs_disk_used_bytes 6.0
"""


def device(**facts: Any) -> dict[str, Any]:
    """What is told of a device."""
    usual = {"name": "A100", "total_bytes": 4000, "budget_bytes": 3000, "used_bytes": 2000, "failure": None}
    return {"uuid": UUID, "metrics": {}} | usual | facts


def copy(**facts: Any) -> dict[str, Any]:
    """What is told of a copy."""
    usual = {"bytes": 2000, "state": "loading", "memory": "ipc", "domain": "all", "uses": 1, "leased": 0, "leases": []}
    return {"path": "net/params", "generation": "0123456789", "tensors": None} | usual | facts


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A control directory of a mount with a device, of which nothing else is seen."""
    for name in ("info", "warm-disk", "warm-host", "verify-gpu", f"warm-{UUID}"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("to", "uid", "name"),
    [
        ("disk", None, "warm-disk"),
        ("host", None, "warm-host"),
        ("gpu", None, f"warm-{UUID}"),
        ("gpu.ipc", 7, f"warm-7~{UUID}.ipc"),
        (f"gpu:{UUID}", 0, f"warm-0~{UUID}"),
        (f"gpu:{UUID}.ipc", None, f"warm-{UUID}.ipc"),
    ],
)
def test_where_to_warm_names_a_command(to: str, uid: int | None, name: str, directory: Path) -> None:
    assert warming(to, uid)(directory) == name


@pytest.mark.parametrize("to", ["", "gpu:", "gpu:.ipc", "host.ipc", "host:0", "disk:", "GPU", f"{UUID}"])
def test_where_nothing_can_be_warmed_is_refused(to: str) -> None:
    with pytest.raises(ConfigurationError, match="must be disk, host, gpu, gpu:UUID or gpu:"):
        warming(to, None)


def test_where_a_part_of_a_mount_is_seen_the_reason_is_elsewhere(directory: Path) -> None:
    (directory / f"warm-{UUID}").unlink()
    with pytest.raises(DeviceError, match="`trimsfs status` on the host says why"):
        warming("gpu", None)(directory)


def test_devices_that_are_still_looked_for_are_waited_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / f"warm-{UUID}").unlink()
    asked: list[Path] = []

    def facts(where: Path) -> dict[str, Any]:
        asked.append(where)
        if len(asked) == 2:
            (directory / f"warm-{UUID}").touch()
        return {"mountpoint": "/models", "gpu": {"unavailable": None, "devices": []}}

    monkeypatch.setattr(gpu, "_facts", facts)
    assert gpu.verifying(directory) == "verify-gpu"
    assert len(asked) == 2
    (directory / f"warm-{UUID}").unlink()
    monkeypatch.setattr(gpu, "SEARCH_TIMEOUT_S", 0)
    with pytest.raises(DeviceError, match="/models uses no GPU: its server is still searching"):
        gpu.verifying(directory)


def test_metrics_are_parted_by_their_labels() -> None:
    loads = "trimsfs_gpu_device_loads_total"
    assert metrics.labelled(TEXT, "device") == {UUID: {loads: 3.0}, OTHER: {loads: 4.0}}
    assert metrics.parse(TEXT) == {"trimsfs_disk_used_bytes": 6.0}


@pytest.mark.parametrize(
    ("unavailable", "told"),
    [
        ("no CUDA device: the driver shows none", "none: no CUDA device: the driver shows none"),
        (None, "none: the server is still searching"),
        (GPU_OFF, 'none: switched off by gpu = "off"'),
    ],
)
def test_why_there_is_no_device_has_a_line(unavailable: str | None, told: str) -> None:
    assert list(lines({"unavailable": unavailable, "devices": []})) == [told]


def test_copies_and_their_leases_have_a_line_each() -> None:
    leases = [
        {"uid": 7, "pid": 0, "container": None, "since": 0},
        {"uid": 8, "pid": 9, "container": "0123456789ab", "since": 0},
    ]
    copies = [copy(leased=3, leases=leases), copy(tensors="*.weight")]
    _, first, unseen, contained, others, second = lines({"unavailable": None, "devices": [device(copies=copies)]})

    assert first == "  /net/params: 2.0 kB, loading, leased by ipc to all, 1 use"
    assert unseen.startswith("    uid 7, since 19")
    assert contained.startswith("    uid 8, pid 9, container 0123456789ab, since 19")
    assert others == "    1 lease of others"
    assert second.startswith("  /net/params, tensors *.weight: 2.0 kB")


def test_a_device_that_has_failed_tells_only_that() -> None:
    (line,) = lines({"unavailable": None, "devices": [device(failure="gone: see `nvidia-smi`")]})
    assert line == f"{UUID} (A100): failed: gone: see `nvidia-smi`"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize(("mode", "allowed"), [(0o666, True), (0o660, False)])
def test_doctor_tells_whether_the_server_may_open_devices(
    mode: int, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o600 if name == "nvidia-modeset" else mode)
    monkeypatch.setattr(gpu_checks, "DEVICES", tmp_path)
    options = MountOptions(server_user="60874")
    if allowed:
        told = gpu_checks._device_nodes(options)
        assert told.startswith("the server, which runs as uid 60874, may open ")
    else:
        with pytest.raises(Advice) as caught:
            gpu_checks._device_nodes(options)
        told = str(caught.value)
        assert "uid 60874, may not open " in told
    assert [name in told for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "nvidia-modeset")] == [*[True] * 3, False]
