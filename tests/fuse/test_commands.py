"""The control surface as seen through a real mount: attributes, control files, and the commands made of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import xattr

from tests.support.mounts import OwnDirectory, mounted, trimsfs, umount, wait_until

MIB = 1 << 20
STRANGER = ["--reuid=12345", "--regid=12345", "--clear-groups"]


def write_model(store: Path) -> Path:
    """A model of two files in the store."""
    directory = store / "resnet50"
    directory.mkdir()
    (directory / "params").write_bytes(os.urandom(17 * MIB))
    (directory / "symbol.json").write_text("{}")
    return directory


@pytest.fixture
def model(store_directory: Path) -> Path:
    """A model in the store of a mount of the test's own."""
    return write_model(store_directory)


@pytest.fixture
def own_model(own_directory: OwnDirectory) -> OwnDirectory:
    """A directory of the test's own with a model in it."""
    write_model(own_directory.store)
    return own_directory


def test_attributes_tell_generation_and_residency(own_model: OwnDirectory) -> None:
    path = own_model.path / "resnet50/params"
    attributes = xattr.xattr(path)

    assert sorted(attributes.list()) == [
        f"user.trims.{name}" for name in ("digest", "etag", "generation", "pinned", "replaced", "residency", "verified")
    ]
    assert attributes["user.trims.verified"] == b"false"
    assert json.loads(attributes["user.trims.residency"]) == {"disk": 0, "host": 0, "gpu": {}}
    path.read_bytes()
    assert json.loads(attributes["user.trims.residency"])["disk"] == 17 * MIB
    assert attributes["user.trims.verified"] == b"true"
    with pytest.raises(OSError, match="No data available"):
        attributes.get("user.trims.absent")
    generation = attributes["user.trims.generation"]
    (own_model.store / "resnet50/params").write_bytes(b"other")
    (own_model.store / "resnet50/params").touch()
    wait_until(lambda: xattr.getxattr(path, "user.trims.generation") != generation)


def test_control_directory_can_be_reached_but_is_not_listed(own_model: OwnDirectory) -> None:
    mount = own_model.mount
    assert ".trims" not in os.listdir(mount.path)
    assert ".trims" not in os.listdir(own_model.path / "resnet50")
    assert set(os.listdir(mount.path / ".trims")) == {"control", "gpu", "metrics", "models", "traces"}
    assert "info" in os.listdir(own_model.path / "resnet50/.trims/params")
    assert mount.info(f"{own_model.path.name}/resnet50/params")["size"] == 17 * MIB
    with pytest.raises(FileNotFoundError):
        (mount.path / ".trims/absent").stat()


def test_warm_pin_evict_and_ls(own_model: OwnDirectory) -> None:
    folder = own_model.path / "resnet50"

    assert trimsfs("warm", folder, "--to", "disk").returncode == 0
    assert _listed(folder) == {"files": 2, "size": 17 * MIB + 2, "disk": 17 * MIB + 2, "open": 0, "pinned": 0}
    assert trimsfs("warm", folder).returncode == 0
    assert trimsfs("pin", "--best-effort", folder / "params").returncode == 0
    assert xattr.getxattr(folder / "params", "user.trims.pinned") == b"true"
    refused = trimsfs("evict", folder)
    assert (refused.returncode, "is pinned" in refused.stderr) == (12, True)
    assert "(1 of 2 files failed, the others are done)" in refused.stderr
    assert refused.stderr.startswith(f"trimsfs: {folder}/params is pinned: ")
    assert _listed(folder)["disk"] == 17 * MIB
    assert trimsfs("unpin", folder / "params").returncode == 0
    with (folder / "params").open("rb"):
        refused = trimsfs("evict", folder / "params")
        assert (refused.returncode, "is in use" in refused.stderr) == (12, True)
        assert f"(used by pid {os.getpid()} (" in refused.stderr
        refused = trimsfs("evict", folder)
        assert (refused.returncode, f"(used by pid {os.getpid()} (" in refused.stderr) == (12, True)
    assert trimsfs("evict", folder).returncode == 0
    assert _listed(folder)["disk"] == 0
    assert "resnet50" in trimsfs("ls", own_model.path).stdout
    assert "params" in trimsfs("ls", "--files", folder).stdout
    files = sorted(folder.iterdir())
    several = json.loads(trimsfs("ls", "--json", *files).stdout)
    assert [row["path"] for row in several] == [str(file) for file in files]


def test_ls_tells_of_files_that_nobody_has_looked_up(own_directory: OwnDirectory) -> None:
    for number in range(300):
        (own_directory.store / f"model-{number}").write_bytes(b"x" * number)
    known = own_directory.mount.metrics()["trimsfs_names_inodes"]
    rows = json.loads(trimsfs("ls", "--json", "--files", own_directory.path).stdout)
    assert {(row["path"], row["size"]) for row in rows} == {
        (str(own_directory.path / f"model-{number}"), number) for number in range(300)
    }
    assert own_directory.mount.metrics()["trimsfs_names_inodes"] < known + 30


def test_results_in_a_pipe_are_one_line_for_each_path(own_model: OwnDirectory) -> None:
    folder, file = own_model.path / "resnet50", own_model.path / "resnet50/params"
    for command, done in {"warm": "warmed", "pin": "pinned", "verify": "verified"}.items():
        told = trimsfs(command, *(["--best-effort"] if command == "pin" else []), folder, file)
        assert (told.returncode, told.stderr) == (0, "")
        lines = [line.partition(";")[0] for line in told.stdout.splitlines()]
        assert lines == [f"{folder}: {done} 2 files, 17.8 MB", f"{file}: {done} 1 file, 17.8 MB"]
    assert trimsfs("warm", "--quiet", folder).stdout == ""
    assert trimsfs("unpin", folder).stdout == f"{folder}: unpinned 2 files\n"
    *_, last = trimsfs("evict", "--json", folder).stdout.splitlines()
    assert (json.loads(last)["state"], json.loads(last)["total_files"]) == ("done", 2)


@pytest.mark.alone  # asks all mounts of the host
def test_a_bind_mount_of_a_part_is_no_mount_of_its_own(own_model: OwnDirectory, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    subprocess.run(["mount", "--bind", own_model.path / "resnet50", given], check=True, timeout=30)
    try:
        shown = [facts["mountpoint"] for facts in json.loads(trimsfs("status", "--json").stdout)]
        assert str(own_model.mount.path) in shown
        assert str(given) not in shown
        assert str(given) not in trimsfs("ls").stdout
        assert str(given) not in trimsfs("doctor").stdout
    finally:
        umount(given)


def test_commands_on_other_paths_fail_clearly(tmp_path: Path, module_mount: OwnDirectory) -> None:
    elsewhere = trimsfs("warm", tmp_path)
    absent = trimsfs("warm", module_mount.path / "absent")

    assert (elsewhere.returncode, "not on a trimsfs mount" in elsewhere.stderr) == (10, True)
    assert (absent.returncode, "No such file" in absent.stderr) == (13, True)
    assert len(absent.stderr.splitlines()) == 1


def test_other_users_may_look_but_not_command(own_model: OwnDirectory) -> None:
    def as_other(name: str) -> "subprocess.CompletedProcess[bytes]":
        path = own_model.path / "resnet50/.trims/params" / name
        return subprocess.run(["setpriv", *STRANGER, "cat", str(path)], capture_output=True, check=False)

    for command in ("warm-disk", "warm-host", "pin", "unpin", "evict", "verify"):
        refused = as_other(command)
        assert (refused.returncode, b"Operation not permitted" in refused.stderr) == (1, True), command
    assert as_other("info").returncode == 0
    path = own_model.path / "resnet50/params"
    look = [
        "setpriv",
        *STRANGER,
        "getfattr",
        "--only-values",
        "--absolute-names",
        "-n",
        "user.trims.verified",
        str(path),
    ]
    assert subprocess.run(look, capture_output=True, check=True).stdout == b"false"


def test_group_told_by_control_gid_may_command(model: Path, store_directory: Path, tmp_path: Path) -> None:
    with mounted(store_directory, tmp_path, "--control-gid", "777") as mount:
        path = mount.path / "resnet50/.trims/params/warm-disk"
        member = ["setpriv", "--reuid=12345", "--regid=12345", "--groups=777"]
        done = subprocess.run([*member, "cat", str(path)], capture_output=True, check=False)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["state"] == "done"


def test_warming_more_than_fits_fails_and_reading_it_does_not(
    model: Path, store_directory: Path, tmp_path: Path
) -> None:
    with mounted(store_directory, tmp_path, "--cache-size", "10MiB") as mount:
        done = trimsfs("warm", mount.path / "resnet50/params")
        assert (done.returncode, "no room in the cache" in done.stderr) == (9, True)
        assert (mount.path / "resnet50/params").read_bytes() == (model / "params").read_bytes()
        assert mount.metrics()["trimsfs_disk_used_bytes"] <= 10 * MIB


def _listed(path: Path) -> dict[str, int]:
    (row,) = json.loads(trimsfs("ls", "--json", path).stdout)
    return {name: row[name] for name in ("files", "size", "disk", "open", "pinned")}
