"""Models as devices of containers."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mountctl.containers import cdi
from mountctl.linux.cdi_specs import default_output, device_name
from tests.containers.engines import Podman, Users, mountctl, run, spec_of
from tests.containers.host import Host
from tests.support.mounts import MOUNTCTL, MountedStore, mounted, wait_until

DEVICE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
VARIABLE = re.compile(r"TRIMSFS_MODEL_[A-Z0-9_]+")
HOSTILE = [
    "new\nline",
    "a=b",
    "with space",
    "ünïcode",
    "\N{SNOWMAN}",
    "x" * 255,
    "é" * 127,
    "-first",
    "last-",
    "all",
    "ALL",
    "a:b",
    "a::b",
    "a-b",
    "a_b",
    "a.b",
    "%s{}$HOME",
    '"; true; "',
    "tab\there\x7f",
    "comma,ro",
    "\\back",
]


def of(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """The device of a model."""
    (device,) = [
        device
        for device in spec["devices"]
        if device["name"] != "all" and device["containerEdits"]["mounts"][0]["hostPath"] == str(path)
    ]
    found: dict[str, Any] = device
    return found


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(st.lists(names, min_size=1, max_size=3).map("/".join), unique=True, max_size=20))
def test_names_of_devices_and_variables_are_valid_and_unique(models: list[str]) -> None:
    spec, _ = cdi.spec_of(Path("/nonexistent/models"), models)

    found = [device["name"] for device in spec["devices"]]
    assert all(DEVICE.fullmatch(name) for name in found)
    assert len(set(found)) == len(found) == len(models) + 1
    variables = [device["containerEdits"]["env"][0].partition("=")[0] for device in spec["devices"][1:]]
    assert all(VARIABLE.fullmatch(name) for name in variables)
    assert len(set(variables)) == len(variables)


def test_no_model_can_take_the_name_of_another() -> None:
    for model in HOSTILE:
        name = device_name(model)
        assert device_name(name) != name or name == model
    assert device_name("meta/llama-3.1") == "meta:llama-3.1"
    assert len({device_name(name) for name in ("a/b", "a:b", "a::b", "a.b", "a b", "a-b")}) == 6


def test_a_container_gets_the_models_that_it_names(
    podman: Podman, models: MountedStore, host: Host, users: Users, devices: Path
) -> None:
    done = mountctl("cdi", models.path, "--depth", "2", "--output", devices / "trimsfs-models.json")
    assert done.returncode == 0, done.stderr
    script = 'sha256sum "$TRIMSFS_MODEL_RESNET50/params" "$TRIMSFS_MODEL_TENANT_A_GPT/params"; ls "$TRIMSFS_MODELS"'
    options = [f"--device=trimsfs.dev/models={name}" for name in ("resnet50", "tenant-a:gpt")]
    first, second, *listed = podman.run(*users.podman, *options, command=("sh", "-c", script)).splitlines()

    assert first.split()[0] == host.digest("resnet50/params")
    assert second.split()[0] == host.digest("tenant-a/gpt/params")
    assert listed == ["resnet50", "tenant-a"]


def test_hostile_names_do_no_harm(podman: Podman, devices: Path, store_directory: Path, tmp_path: Path) -> None:
    for name in HOSTILE:
        (store_directory / name / "below").mkdir(parents=True)
        (store_directory / name / "below/params").write_text(f"weights of {name}")
    (store_directory / "below-a-file").write_text("")
    with mounted(store_directory, tmp_path) as mount:
        spec = spec_of(mount.path, "--depth", "2")
        (devices / "trimsfs-x.json").write_text(json.dumps(spec))
        assert len(spec["devices"]) == 1 + 2 * len(HOSTILE)
        named = {name: of(spec, mount.path / name) for name in HOSTILE}
        options = [f"--device=trimsfs.dev/models={device['name']}" for device in named.values()]
        variables = [device["containerEdits"]["env"][0].partition("=")[0] for device in named.values()]
        script = "; ".join(f'cat "${variable}/below/params"; printf "\\\\0"' for variable in variables)
        shown = podman.run(*options, command=("sh", "-c", script))
    assert shown.split("\0") == [*(f"weights of {name}" for name in HOSTILE), ""]


def test_names_that_json_cannot_hold_are_left_out_and_told_of(store_directory: Path, tmp_path: Path) -> None:
    os.makedirs(os.fsencode(store_directory) + b"/\xff\xfe")
    (store_directory / "good").mkdir()
    (store_directory / "good/params").write_text("")
    Path(os.fsdecode(os.fsencode(store_directory) + b"/\xff\xfe"), "params").write_text("")
    with mounted(store_directory, tmp_path) as mount:
        shown = os.listdir(os.fsencode(mount.path))
        done = mountctl("cdi", mount.path, "--output", "-")
    assert done.returncode == 0, done.stderr
    assert [device["name"] for device in json.loads(done.stdout)["devices"]] == ["all", "good"]
    assert ("1 models left out" in done.stderr) == (b"\xff\xfe" in shown)


def test_a_spec_is_put_in_place_whole_for_all_to_read(models: MountedStore, tmp_path: Path) -> None:
    output = tmp_path / "trimsfs-models.json"
    output.write_text("of before")
    inode = output.stat().st_ino
    done = mountctl("cdi", models.path, "--output", output)
    assert done.returncode == 0, done.stderr
    assert output.stat().st_mode & 0o777 == 0o644
    assert output.stat().st_ino != inode
    assert json.loads(output.read_text())["kind"] == "trimsfs.dev/models"
    assert os.listdir(tmp_path) == [output.name]


def test_a_spec_replaces_no_device_or_pipe(models: MountedStore, tmp_path: Path) -> None:
    output = tmp_path / "pipe"
    os.mkfifo(output)
    done = mountctl("cdi", models.path, "--output", output)
    assert done.returncode != 0
    assert f"{output}: it is no regular file" in done.stderr
    assert output.is_fifo()


def test_devices_of_two_mounts_do_not_hide_each_other(
    models: MountedStore, tmp_path: Path, store_directory: Path
) -> None:
    output = tmp_path / "specs"
    output.mkdir()
    assert mountctl("cdi", models.path, "--output", output / "one.json").returncode == 0
    with mounted(store_directory, tmp_path) as other:
        done = mountctl("cdi", other.path, "--output", output / "two.json")
        assert (done.returncode, "choose another --class" in done.stderr) == (2, True)
        assert os.listdir(output) == ["one.json"]
        assert mountctl("cdi", other.path, "--output", output / "two.json", "--class", "others").returncode == 0
        done = mountctl("cdi", "--output", "-")
        assert (done.returncode, "name one of" in done.stderr) == (2, True)


@pytest.mark.alone  # asks all mounts of the host
def test_the_only_mount_need_not_be_named(models: MountedStore) -> None:
    """In a mount namespace in which those of others are unmounted."""
    others = f"awk '/ - fuse.trimsfs / && $5 != \"{models.path}\" {{print $5}}' /proc/self/mountinfo"
    script = f"for other in $({others}); do umount -l $other; done; {MOUNTCTL} cdi --output - && umount {models.path}; "
    script += f"{MOUNTCTL} cdi --output - >&2"
    done = run("unshare", "--mount", "sh", "-c", script)
    assert json.loads(done.stdout)["containerEdits"]["env"] == [f"TRIMSFS_MODELS={models.path}"]
    assert (done.returncode, "there is no trimsfs mount" in done.stderr) == (10, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/etc"], 10, "/etc: no trimsfs mount"),
        (["MODELS", "--class", "a/b"], 2, "--class a/b"),
        (["MODELS", "--output", "/nonexistent/x.json"], 1, "No such file or directory"),
        (["MODELS", "--output", "MODELS/x.json"], 1, "Read-only file system"),
    ],
)
def test_what_cannot_be_written_gives_one_line_and_its_exit_code(
    arguments: list[str], code: int, message: str, models: MountedStore
) -> None:
    done = mountctl("cdi", *(text.replace("MODELS", str(models.path)) for text in arguments))
    assert done.returncode == code
    (line,) = [line for line in done.stderr.splitlines() if "device all" not in line]
    assert message in line


def test_where_engines_look_is_where_it_is_written_by_default(podman: Podman, models: MountedStore) -> None:
    assert default_output(Path("/models")) == Path("/var/run/cdi/trimsfs-models.json")
    assert default_output(Path("/srv/a b")).name.startswith("trimsfs-srv-a-b-")
    output = default_output(models.path)
    try:
        done = mountctl("cdi", models.path, "--class", "of-tests")
        assert (done.returncode, str(output) in done.stdout) == (0, True), done.stderr
        assert output.stat().st_mode & 0o777 == 0o644
    finally:
        output.unlink(missing_ok=True)


def test_device_all_follows_a_mount_made_anew(podman: Podman, fresh_host: Host, devices: Path) -> None:
    with fresh_host.mounted() as mount:
        done = mountctl("cdi", mount.path, "--output", devices / "trimsfs-models.json")
        assert (done.returncode, done.stderr) == (0, "")
    with podman.started("--device", "trimsfs.dev/models=all") as container:
        assert container.read("ls", str(mount.path)) == ""
        for _ in range(2):
            with fresh_host.mounted():
                path = f"{mount.path}/resnet50/params"
                expected = fresh_host.digest("resnet50/params")
                assert container.read("sha256sum", path).split()[0] == expected
            assert container.read("ls", str(mount.path)) == ""


def test_device_all_never_brings_what_lies_beside_the_mount(
    store_directory: Path, tmp_path: Path, fresh_host: Host
) -> None:
    """A parent directory that is not shared, or that holds other things, is not given to containers."""
    with mounted(store_directory, tmp_path) as mount:
        done = mountctl("cdi", mount.path, "--output", "-")
        assert "does not follow a remount" in done.stderr
        assert json.loads(done.stdout)["devices"][0]["containerEdits"]["mounts"][0]["hostPath"] == str(mount.path)
    secret = fresh_host.shared / "secret"
    with fresh_host.mounted() as mount:
        secret.write_text("of the host")
        try:
            done = mountctl("cdi", mount.path, "--output", "-")
        finally:
            secret.unlink()
        assert "holds only mount points" in done.stderr
        assert json.loads(done.stdout)["devices"][0]["containerEdits"]["mounts"][0]["hostPath"] == str(mount.path)


def test_two_containers_map_one_copy(podman: Podman, fresh_host: Host, devices: Path) -> None:
    with fresh_host.mounted() as mount:
        mountctl("cdi", mount.path, "--output", devices / "trimsfs-models.json")
        path = f"{mount.path}/resnet50/params"
        size = len(fresh_host.content("resnet50/params"))
        option, command = "--device=trimsfs.dev/models=resnet50", ("probe", "map", path)
        with podman.started(option, command=command) as one:
            assert mapped(one.pid, path, size) == (size, size)
            with podman.started(option, command=command) as other:
                assert mapped(other.pid, path, size) == (size, size // 2)
                assert mapped(one.pid, path, size) == (size, size // 2)


def mapped(pid: int, path: str, size: int) -> tuple[int, int]:
    """Rss and Pss of a file's mapping in a process once all of it is there, less than a page off taken for exact."""
    found: dict[str, int] = {}

    def there() -> bool:
        at = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                at = line.endswith(path)
            elif at and line.startswith(("Rss:", "Pss:")):
                found[line[:3]] = int(line.split()[1]) * 1024
        return found.get("Rss", 0) >= size

    wait_until(there)
    exact = {size: size, size // 2: size // 2}
    near = [next((value for value in exact if abs(value - number) <= 8192), number) for number in found.values()]
    return near[0], near[1]
