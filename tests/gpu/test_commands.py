"""What operators see of GPUs, and do about them, on real mounts with emulated devices."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import KernelDriver, environment
from tests.support import model_files
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until

MIB = 1 << 20
PARAMS = 5 * MIB
HEADROOM = ("gpu_headroom=4MiB",)
OTHER = 12345
OTHER_SIZE = len(model_files.safetensors({"weight": model_files.Array("float16", (MIB // 2,), bytes(MIB))}))


@dataclass(frozen=True, slots=True)
class Scene:
    """A mount, and the devices that its server sees."""

    mount: MountedStore
    kernel: KernelDriver

    @property
    def devices(self) -> list[str]:
        """The devices' UUIDs."""
        return [device.uuid for device in self.kernel.devices]

    @property
    def folder(self) -> Path:
        """The model: a directory with its parameters and a small file."""
        return self.mount.path / "resnet50"

    def copies(self, number: int = 0) -> list[dict[str, Any]]:
        """The copies on a device, as its users see them."""
        devices = json.loads((self.mount.path / ".trims/gpu").read_text())["devices"]
        copies: list[dict[str, Any]] = devices[number]["copies"]
        return copies

    def lent(self, name: str, number: int = 0) -> Path:
        """The control file by which a program gets a copy."""
        return self.folder / ".trims" / name / "gpu" / self.devices[number]


@pytest.fixture
def store(store_directory: Path) -> Path:
    """A store with a model."""
    directory = store_directory / "resnet50"
    directory.mkdir()
    weight = model_files.Array("float16", (PARAMS // 2,), os.urandom(PARAMS))
    (directory / "params").write_bytes(model_files.safetensors({"weight": weight}))
    (directory / "symbol.json").write_text("{}")
    return store_directory


@contextmanager
def staged(store: Path, directory: Path, sizes: list[int], *options: str) -> Iterator[Scene]:
    """The store, mounted where there are devices of such sizes."""
    with (
        KernelDriver(directory, sizes) as kernel,
        mounted(store, directory, *HEADROOM, *options, environment=environment(kernel)) as mount,
    ):
        yield Scene(mount, kernel)


@pytest.fixture
def scene(store: Path, tmp_path: Path) -> Iterator[Scene]:
    """A mount with two devices."""
    with staged(store, tmp_path, [64 * MIB, 32 * MIB]) as scene:
        yield scene


@pytest.fixture
def single(store: Path, tmp_path: Path) -> Iterator[Scene]:
    """A mount with one device."""
    with staged(store, tmp_path, [32 * MIB]) as scene:
        yield scene


@dataclass(frozen=True, slots=True)
class Replaced(Scene):
    """A mount whose model is another than the one that a lease, the descriptor ``old``, keeps on the device."""

    old: int


@pytest.fixture
def replaced(store: Path, tmp_path: Path) -> Iterator[Replaced]:
    """A mount with one device, where a model has been replaced in the store."""
    with staged(store, tmp_path, [32 * MIB], "--metadata-ttl", "0.1") as scene:
        params = scene.folder / "params"
        old = os.open(scene.lent("params"), os.O_RDONLY)
        try:
            weight = model_files.Array("float16", (MIB // 2,), bytes(MIB))
            (store / "resnet50/params").write_bytes(model_files.safetensors({"weight": weight}))
            wait_until(lambda: params.stat().st_size == OTHER_SIZE)
            wait_until(lambda: scene.mount.info("resnet50/params")["size"] == OTHER_SIZE)
            yield Replaced(scene.mount, scene.kernel, old)
        finally:
            with suppress(OSError):
                os.close(old)


def fails(code: int, told: str, *arguments: str | Path) -> None:
    """A command fails with a code, and one line that tells."""
    done = trimsfs(*arguments)
    assert (done.returncode, told in done.stderr, done.stderr.count("\n")) == (code, True, 1), done.stderr


def test_a_directory_is_warmed_to_the_device_that_is_named(scene: Scene) -> None:
    done = trimsfs("warm", scene.folder, "--to", f"gpu:{scene.devices[1]}")

    assert done.returncode == 0, done.stderr
    left_out = "left out 1 of 2 files of unknown format: name one to load it anyway"
    assert done.stdout.startswith(f"{scene.folder}: warmed 1 file, ")
    assert done.stdout.endswith(f"; {left_out}\n")
    assert not scene.copies(0)
    assert {copy["path"]: (copy["state"], copy["domain"]) for copy in scene.copies(1)} == {
        "resnet50/params": ("loaded", "uid 0"),  # and not what is no model
    }
    assert scene.mount.info("resnet50/params")["residency"]["gpu"].keys() == {scene.devices[1]}


def test_a_file_that_is_no_model_is_warmed_when_it_is_named(single: Scene) -> None:
    done = trimsfs("warm", single.folder / "symbol.json", "--to", "gpu")
    assert (done.returncode, done.stdout) == (0, f"{single.folder}/symbol.json: warmed 1 file, 2 bytes\n")
    assert [copy["path"] for copy in single.copies()] == ["resnet50/symbol.json"]


def test_what_is_warmed_is_what_programs_get(scene: Scene) -> None:
    params = scene.folder / "params"
    assert trimsfs("warm", params, "--to", f"gpu:{scene.devices[0]}").returncode == 0
    with scene.lent("params").open() as file:
        file.read()
        (copy,) = scene.copies()
        assert (copy["uses"], copy["leased"]) == (2, 1)


def test_a_device_need_not_be_named_where_there_is_one(single: Scene) -> None:
    params = single.folder / "params"
    for to in ("gpu", "gpu.ipc", f"gpu:{single.devices[0]}.ipc"):
        done = trimsfs("warm", params, "--to", to)
        assert done.returncode == 0, done.stderr
    assert sorted(copy["memory"] for copy in single.copies()) == ["ipc", "vmm"]


def test_a_copy_can_be_warmed_for_another_user(single: Scene) -> None:
    domains = set()
    for uid in (OTHER, 1000660000, (1 << 32) - 2):
        done = trimsfs("warm", single.folder / "params", "--to", "gpu", "--for-uid", str(uid))

        assert done.returncode == 0, done.stderr
        domains.add(f"uid {uid}")
        assert sorted(copy["domain"] for copy in single.copies()) == sorted(domains)


def test_what_cannot_be_warmed_is_told_in_a_line(scene: Scene, store: Path, tmp_path: Path) -> None:
    one, other = sorted(scene.devices)
    params = scene.folder / "params"
    (store / "large").write_bytes(bytes(30 * MIB))
    absent = "GPU-00000000-0000-0000-0000-000000000000"
    fails(15, f"no device {absent}: this mount has {one}, {other}", "warm", params, "--to", f"gpu:{absent}")
    fails(15, "no device 0: this mount has", "warm", params, "--to", "gpu:0")
    fails(2, f"several devices: use --to gpu:UUID, one of {one}, {other}", "warm", params, "--to", "gpu")
    fails(2, "option --to gpu:: must be disk, host, gpu", "warm", params, "--to", "gpu:")
    fails(2, "option --to tape: must be disk, host, gpu", "warm", params, "--to", "tape")
    fails(2, "only copies on GPUs belong to a user", "warm", params, "--for-uid", "1")
    fails(16, "raise gpu_memory", "warm", scene.mount.path / "large", "--to", f"gpu:{scene.devices[1]}")
    fails(10, "is not on a trimsfs mount", "warm", tmp_path, "--to", "gpu")
    fails(13, "No such file", "warm", scene.folder / "absent", "--to", "gpu")


def test_a_mount_that_shares_no_copies_is_not_warmed(store: Path, tmp_path: Path) -> None:
    with staged(store, tmp_path, [32 * MIB], "gpu_sharing=none") as scene:
        fails(2, "gpu_sharing none", "warm", scene.folder / "params", "--to", "gpu")


@pytest.mark.parametrize(
    ("option", "reason"),
    [("auto", "no CUDA device: cuInit: CUDA_ERROR_NO_DEVICE"), ("off", 'switched off by gpu = "off"')],
)
def test_a_mount_without_a_device_tells_why(option: str, reason: str, store: Path, tmp_path: Path) -> None:
    with mounted(store, tmp_path, f"gpu={option}", environment=environment(None)) as mount:
        folder = mount.path / "resnet50"
        fails(15, f"{mount.path} uses no GPU: {reason}", "warm", folder, "--to", "gpu")
        fails(15, f"{mount.path} uses no GPU: {reason}", "verify", folder, "--tier", "gpu")
        assert f"  gpu         none: {reason}" in trimsfs("status", mount.path).stdout
        assert "GPU" not in trimsfs("ls", mount.path).stdout
        (model,) = json.loads(trimsfs("ls", mount.path, "--json").stdout)
        assert model["gpu"] == {}


def test_verifying_finds_a_damaged_copy(scene: Scene) -> None:
    for device in scene.devices:
        assert trimsfs("warm", scene.folder, "--to", f"gpu:{device}").returncode == 0
    done = trimsfs("verify", "--tier", "gpu", scene.folder / "params")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{scene.folder}/params: 2 copies compared, no difference\n"
    damaged = next(a for a in scene.kernel.devices[1].allocations() if a.nbytes >= PARAMS)
    scene.kernel.flip(damaged.number, 3 * MIB)

    told = f"params: its copy on {scene.devices[1]} differs from the file"
    fails(17, told, "verify", "--tier", "gpu", scene.folder)
    assert [copy["path"] for copy in scene.copies(0)] != [copy["path"] for copy in scene.copies(1)]
    done = trimsfs("verify", "--tier", "gpu", scene.folder / "params")  # it is gone
    assert (done.returncode, done.stdout) == (0, f"{scene.folder}/params: 1 copy compared, no difference\n")


def test_status_shows_devices_copies_and_who_uses_them(scene: Scene) -> None:
    first, second = scene.devices
    assert trimsfs("warm", scene.folder / "params", "--to", f"gpu:{first}").returncode == 0
    with scene.lent("params").open() as file:
        file.read()
        told = trimsfs("status", scene.mount.path, "--gpu").stdout.splitlines()
        (facts,) = json.loads(trimsfs("status", scene.mount.path, "--json").stdout)
        brief = trimsfs("status", scene.mount.path).stdout.splitlines()

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


def test_other_users_neither_warm_nor_verify_nor_learn_who_has_leases(scene: Scene) -> None:
    def as_other(path: Path) -> "subprocess.CompletedProcess[bytes]":
        drop = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups"]
        return subprocess.run([*drop, "cat", path], capture_output=True, timeout=60, check=False)

    commands = scene.folder / ".trims/params"
    for name in (f"warm-{scene.devices[0]}", f"warm-{OTHER}~{scene.devices[0]}", "verify-gpu"):
        assert b"Operation not permitted" in as_other(commands / name).stderr
    with scene.lent("params").open() as file:
        file.read()
        devices = json.loads(as_other(scene.mount.path / ".trims/gpu").stdout)["devices"]
    assert [device["copies"] for device in devices] == [[], []]  # none that this user could have


def test_status_tells_that_a_device_has_failed(single: Scene) -> None:
    params = single.folder / "params"
    assert trimsfs("warm", params, "--to", "gpu").returncode == 0
    single.kernel.devices[0].lose()
    fails(15, "CUDA_ERROR", "warm", single.folder / "symbol.json", "--to", "gpu")
    told = trimsfs("status", single.mount.path).stdout
    assert f"{single.devices[0]} (Emulated device 0, no GPU): failed: " in told
    assert "check `nvidia-smi`" in told


def test_ls_shows_what_copies_take(scene: Scene) -> None:
    headings, line = trimsfs("ls", scene.mount.path).stdout.splitlines()
    assert headings.split() == ["MODEL", "FILES", "SIZE", "DISK", "HOST", "GPU", "OPEN", "PINNED"]
    assert line.split()[-1] == "-"
    for device in scene.devices:
        assert trimsfs("warm", scene.folder / "params", "--to", f"gpu:{device}").returncode == 0
    _, line = trimsfs("ls", scene.mount.path).stdout.splitlines()
    assert line.split()[-2:] == ["12.6", "MB"]
    (model,) = json.loads(trimsfs("ls", scene.mount.path, "--json").stdout)
    assert model["gpu"] == dict.fromkeys(scene.devices, 6 * MIB)
    assert trimsfs("evict", scene.folder).returncode == 0
    wait_until(lambda: not any(device.used for device in scene.kernel.devices))


def test_of_a_file_that_has_been_replaced_ls_shows_what_it_is_now(replaced: Replaced) -> None:
    def listed(*path: Path | str) -> dict[str, Any]:
        models = json.loads(trimsfs("ls", "--files", "--json", *path).stdout)
        model: dict[str, Any] = next(model for model in models if model["path"] == str(replaced.folder / "params"))
        return {name: model[name] for name in ("size", "disk", "gpu")}

    params = replaced.folder / "params"
    for path in (replaced.mount.path, replaced.folder, params):
        assert listed(path) == {"size": OTHER_SIZE, "disk": 0, "gpu": {}}
    assert trimsfs("warm", params, "--to", "gpu").returncode == 0
    for path in (replaced.mount.path, replaced.folder, params):
        assert listed(path) == {"size": OTHER_SIZE, "disk": OTHER_SIZE, "gpu": {replaced.devices[0]: 2 * MIB}}


def test_evicting_reaches_copies_of_what_a_file_was_unless_they_are_in_use(replaced: Replaced) -> None:
    params = replaced.folder / "params"
    (old,) = replaced.copies()
    assert trimsfs("warm", params, "--to", "gpu").returncode == 0
    told = trimsfs("status", "--gpu", replaced.mount.path).stdout
    (new,) = [copy for copy in replaced.copies() if copy["generation"] != old["generation"]]
    for copy, size in ((old, "6.3 MB"), (new, "2.1 MB")):
        assert f"/resnet50/params ({copy['generation'][:8]}): {size}, loaded" in told

    with os.fdopen(replaced.old):
        fails(12, f"in use on {replaced.devices[0]}", "evict", params)
        assert old["generation"] in {copy["generation"] for copy in replaced.copies()}
    wait_until(lambda: not any(copy["leased"] for copy in replaced.copies()))
    assert trimsfs("evict", params).returncode == 0
    assert replaced.copies() == []
    wait_until(lambda: replaced.kernel.devices[0].used == 0)


def test_a_model_that_has_left_the_disk_is_listed_with_its_copies(store: Path, tmp_path: Path) -> None:
    (store / "bert").write_bytes(bytes(PARAMS))
    with staged(store, tmp_path, [32 * MIB], "--cache-size", "8MiB") as scene:
        params = scene.folder / "params"
        assert trimsfs("warm", params, "--to", "gpu").returncode == 0
        assert trimsfs("warm", scene.mount.path / "bert", "--to", "disk").returncode == 0
        (model,) = json.loads(trimsfs("ls", scene.folder, "--json").stdout)
        assert (model["disk"], model["gpu"]) == (0, {scene.devices[0]: 6 * MIB})
        assert trimsfs("evict", params).returncode == 0
        models = json.loads((scene.mount.path / ".trims/models").read_text())["models"]
        assert [model["path"] for model in models] == ["bert"]


def test_doctor_names_the_devices(store: Path, tmp_path: Path) -> None:
    with KernelDriver(tmp_path, [64 * MIB, 32 * MIB]) as kernel:
        places = ("--store", store, "--cache-dir", tmp_path / "cache")
        done = trimsfs("doctor", *places, environment=environment(kernel))
        off = trimsfs("doctor", *places, "gpu=off", environment=environment(kernel))

    lines = done.stdout.splitlines()
    assert any(line.startswith("ok    CUDA: cuda-bindings ") and "driver for CUDA" in line for line in lines)
    one, other = (device.uuid for device in kernel.devices)
    assert (
        f"ok    GPUs: {one} (Emulated device 0, no GPU, 64 MiB), {other} (Emulated device 1, no GPU, 32 MiB)" in lines
    )
    assert 'ok    CUDA: switched off by gpu = "off"' in off.stdout
    assert "GPUs: " not in off.stdout
