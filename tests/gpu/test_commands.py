"""What operators see of GPUs, and do about them, on real mounts with emulated devices."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import KernelDriver, environment
from tests.gpu.scene import MIB, NOWHERE, OTHER_USER, Scene, scene
from tests.support import model_files
from tests.support.mounts import trimsfs, wait_until

PARAMS = 5 * MIB
TWO, ONE = (64 * MIB, 32 * MIB), (32 * MIB,)
"""Devices of so many bytes."""
NEW = model_files.safetensors({"weight": model_files.Array("float16", (MIB // 2,), bytes(MIB))})


@pytest.fixture
def store(store_directory: Path) -> Path:
    """A store with a model: a directory with its parameters and a small file."""
    directory = store_directory / "resnet50"
    directory.mkdir()
    weight = model_files.Array("float16", (PARAMS // 2,), os.urandom(PARAMS))
    (directory / "params").write_bytes(model_files.safetensors({"weight": weight}))
    (directory / "symbol.json").write_text("{}")
    return store_directory


@pytest.fixture
def host(store: Path, tmp_path: Path) -> Iterator[Scene]:
    """A mount with two devices."""
    with scene(store, tmp_path, memory=TWO) as found:
        yield found


@pytest.fixture
def single(store: Path, tmp_path: Path) -> Iterator[Scene]:
    """A mount with one device."""
    with scene(store, tmp_path, memory=ONE) as found:
        yield found


@dataclass(frozen=True, slots=True)
class Replaced:
    """A mount whose model is another than the one that a lease, the descriptor ``old``, keeps on the device."""

    host: Scene
    old: int


@pytest.fixture
def replaced(store: Path, tmp_path: Path) -> Iterator[Replaced]:
    """A mount with one device, where a model has been replaced in the store."""
    with scene(store, tmp_path, "--metadata-ttl", "0.1", memory=ONE) as host:
        old = os.open(host.control_file("resnet50/params"), os.O_RDONLY)
        try:
            (store / "resnet50/params").write_bytes(NEW)
            wait_until(lambda: host.file("resnet50/params").stat().st_size == len(NEW))
            wait_until(lambda: host.mount.info("resnet50/params")["size"] == len(NEW))
            yield Replaced(host, old)
        finally:
            with suppress(OSError):
                os.close(old)


def fails(code: int, told: str, *arguments: str | Path) -> None:
    """A command fails with a code, and one line that tells."""
    done = trimsfs(*arguments)
    assert (done.returncode, told in done.stderr, done.stderr.count("\n")) == (code, True, 1), done.stderr


def warm(path: Path, to: str = "gpu", *options: str) -> str:
    """What warming tells."""
    done = trimsfs("warm", path, "--to", to, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(*arguments: Path | str) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = json.loads(trimsfs("ls", "--json", *arguments).stdout)
    return models


def test_a_directory_is_warmed_to_the_device_that_is_named(host: Scene) -> None:
    folder = host.file("resnet50")
    told = warm(folder, f"gpu:{host.devices[1]}")

    left_out = "left out 1 of 2 files of unknown format: name one to load it anyway"
    assert told.startswith(f"{folder}: warmed 1 file, ")
    assert told.endswith(f"; {left_out}\n")
    assert not host.copies(0)
    assert [(copy["path"], copy["state"], copy["domain"]) for copy in host.copies(1)] == [
        ("resnet50/params", "loaded", "uid 0"),  # and not what is no model
    ]
    assert host.mount.info("resnet50/params")["residency"]["gpu"].keys() == {host.devices[1]}


def test_what_warm_takes_for_a_device_where_there_is_one(single: Scene) -> None:
    folder = single.file("resnet50")
    assert warm(folder / "symbol.json") == f"{folder}/symbol.json: warmed 1 file, 2 bytes\n"  # no model, but named
    for to in ("gpu", "gpu.ipc", f"gpu:{single.device}.ipc"):
        warm(folder / "params", to)
    assert sorted((copy["path"], copy["memory"]) for copy in single.copies()) == [
        *(("resnet50/params", memory) for memory in ("ipc", "vmm")),
        ("resnet50/symbol.json", "vmm"),
    ]


def test_a_copy_can_be_warmed_for_another_user(single: Scene) -> None:
    domains = set()
    for uid in (OTHER_USER, 1000660000, (1 << 32) - 2):
        warm(single.file("resnet50/params"), "gpu", "--for-uid", str(uid))
        domains.add(f"uid {uid}")
        assert sorted(copy["domain"] for copy in single.copies()) == sorted(domains)


def test_what_cannot_be_warmed_is_told_in_a_line(host: Scene, store: Path, tmp_path: Path) -> None:
    one, other = sorted(host.devices)
    params = host.file("resnet50/params")
    (store / "large").write_bytes(bytes(30 * MIB))
    fails(15, f"no device {NOWHERE}: this mount has {one}, {other}", "warm", params, "--to", f"gpu:{NOWHERE}")
    fails(15, "no device 0: this mount has", "warm", params, "--to", "gpu:0")
    fails(2, f"several devices: use --to gpu:UUID, one of {one}, {other}", "warm", params, "--to", "gpu")
    fails(2, "option --to gpu:: must be disk, host, gpu", "warm", params, "--to", "gpu:")
    fails(2, "only copies on GPUs belong to a user", "warm", params, "--for-uid", "1")
    fails(16, "raise gpu_memory", "warm", host.file("large"), "--to", f"gpu:{host.devices[1]}")
    fails(10, "is not on a trimsfs mount", "warm", tmp_path, "--to", "gpu")
    fails(13, "No such file", "warm", host.file("resnet50/absent"), "--to", "gpu")


def test_a_mount_that_shares_no_copies_is_not_warmed(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, "gpu_sharing=none", memory=ONE) as host:
        fails(2, "gpu_sharing none", "warm", host.file("resnet50/params"), "--to", "gpu")


def test_status_shows_devices_copies_and_who_uses_them(host: Scene) -> None:
    first, second = host.devices
    warm(host.file("resnet50/params"), f"gpu:{first}")
    with open(host.control_file("resnet50/params")) as file:
        file.read()
        told = trimsfs("status", host.mount.path, "--gpu").stdout.splitlines()
        (facts,) = json.loads(trimsfs("status", host.mount.path, "--json").stdout)
        brief = trimsfs("status", host.mount.path).stdout.splitlines()

    (line,) = [line for line in told if line.startswith("  gpu ")]
    assert line.startswith(f"  gpu         {first} (Emulated device 0, no GPU): 6.3 MB of 53.7 MB (of 67.1 MB), ")
    assert "1 copy, 1 lease, 1 hit, 1 load at " in line
    assert line.endswith("B/s, 0 evictions")
    copy, lease, other = told[told.index(line) + 1 :][:3]
    assert copy == f"{'':16}/resnet50/params: 6.3 MB, loaded, leased by vmm to uid 0, 2 uses"
    assert lease.startswith(f"{'':18}uid 0, pid {os.getpid()}")
    assert other == (
        f"{'':14}{second} (Emulated device 1, no GPU): 0 bytes of 26.8 MB (of 33.6 MB), "
        "0 copies, 0 leases, 0 hits, 0 loads, 0 evictions"
    )
    assert [line, other] == [line for line in brief if "GPU-" in line]
    device = facts["gpu"]["devices"][0]
    assert device["metrics"]["trimsfs_gpu_device_hits_total"] == 1
    assert device["copies"][0]["leases"][0]["pid"] == os.getpid()


def test_other_users_neither_warm_nor_verify_nor_learn_who_has_leases(host: Scene) -> None:
    def as_other(path: Path) -> "subprocess.CompletedProcess[bytes]":
        drop = ["setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"]
        return subprocess.run([*drop, "cat", path], capture_output=True, timeout=60, check=False)

    commands = host.file("resnet50/.trims/params")
    for name in (f"warm-{host.device}", f"warm-{OTHER_USER}~{host.device}", "verify-gpu"):
        assert b"Operation not permitted" in as_other(commands / name).stderr
    with open(host.control_file("resnet50/params")) as file:
        file.read()
        devices = json.loads(as_other(host.mount.path / ".trims/gpu").stdout)["devices"]
    assert [device["copies"] for device in devices] == [[], []]  # none that this user could have


def test_ls_shows_what_copies_take(host: Scene) -> None:
    headings, line = trimsfs("ls", host.mount.path).stdout.splitlines()
    assert headings.split() == ["MODEL", "FILES", "SIZE", "DISK", "HOST", "GPU", "OPEN", "PINNED"]
    assert line.split()[-1] == "-"
    for device in host.devices:
        warm(host.file("resnet50/params"), f"gpu:{device}")
    _, line = trimsfs("ls", host.mount.path).stdout.splitlines()
    assert line.split()[-2:] == ["12.6", "MB"]
    assert [model["gpu"] for model in listed(host.mount.path)] == [dict.fromkeys(host.devices, 6 * MIB)]
    assert trimsfs("evict", host.file("resnet50")).returncode == 0
    wait_until(lambda: not any(device.used for device in host.kernel.devices))


def test_of_a_file_that_has_been_replaced_ls_shows_what_it_is_now(replaced: Replaced) -> None:
    host = replaced.host
    params = host.file("resnet50/params")

    def shown() -> list[list[Any]]:
        """By the mount, its directory and itself."""
        paths = (host.mount.path, host.file("resnet50"), params)
        every = [model for path in paths for model in listed("--files", path) if model["path"] == str(params)]
        return [[model[name] for name in ("size", "disk", "gpu")] for model in every]

    assert shown() == [[len(NEW), 0, {}]] * 3
    warm(params)
    assert shown() == [[len(NEW), len(NEW), {host.device: 2 * MIB}]] * 3


def test_evicting_reaches_copies_of_what_a_file_was_unless_they_are_in_use(replaced: Replaced) -> None:
    host = replaced.host
    params = host.file("resnet50/params")
    (old,) = host.copies()
    warm(params)
    told = trimsfs("status", "--gpu", host.mount.path).stdout
    (new,) = [copy for copy in host.copies() if copy["generation"] != old["generation"]]
    for copy, size in ((old, "6.3 MB"), (new, "2.1 MB")):
        assert f"/resnet50/params ({copy['generation'][:8]}): {size}, loaded" in told

    with os.fdopen(replaced.old):
        fails(12, f"in use on {host.device}", "evict", params)
        assert old["generation"] in {copy["generation"] for copy in host.copies()}
    wait_until(lambda: host.leases() == 0)
    assert trimsfs("evict", params).returncode == 0
    assert host.copies() == []
    wait_until(lambda: host.kernel.devices[0].used == 0)


def test_a_model_that_has_left_the_disk_is_listed_with_its_copies(store: Path, tmp_path: Path) -> None:
    (store / "bert").write_bytes(bytes(PARAMS))
    with scene(store, tmp_path, "--cache-size", "8MiB", memory=ONE) as host:
        params = host.file("resnet50/params")
        warm(params)
        warm(host.file("bert"), "disk")
        (model,) = listed(host.file("resnet50"))
        assert (model["disk"], model["gpu"]) == (0, {host.device: 6 * MIB})
        assert trimsfs("evict", params).returncode == 0
        models = json.loads((host.mount.path / ".trims/models").read_text())["models"]
        assert [model["path"] for model in models] == ["bert"]


def test_doctor_names_the_devices(store: Path, tmp_path: Path) -> None:
    with KernelDriver(tmp_path, TWO) as kernel:
        places = ("--store", store, "--cache-dir", tmp_path / "cache")
        told = trimsfs("doctor", *places, environment=environment(kernel)).stdout
        off = trimsfs("doctor", *places, "gpu=off", environment=environment(kernel)).stdout

    one, other = (device.uuid for device in kernel.devices)
    assert "ok    CUDA: cuda-bindings " in told
    assert "driver for CUDA" in told
    assert (
        f"ok    GPUs: {one} (Emulated device 0, no GPU, 64 MiB), {other} (Emulated device 1, no GPU, 32 MiB)\n" in told
    )
    assert 'ok    CUDA: switched off by gpu = "off"' in off
    assert "GPUs: " not in off
