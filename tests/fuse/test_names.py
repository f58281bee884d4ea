"""What users type: paths in every form, verbs of everybody, and output to anything, on one mount."""

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mountctl.commands.main import main as mountctl
from tests.services.fast import start_fast
from tests.support.mounts import MOUNTCTL, TRIMSFS, OwnDirectory, mounted
from tests.support.mounts import trimsfs as run
from tests.support.users import STRANGER, as_user
from trimsfs.cli.main import main as trimsfs
from trimsfs.command_group import CommandGroup
from trimsfs.filesystem.names import MANY_INODES

MIB = 1 << 20


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnDirectory]:
    """A mount that believes names for longer than any test takes, with a tenant."""
    directory = tmp_path_factory.mktemp("names")
    store, config = directory / "store", directory / "config.toml"
    (store / "tenant").mkdir(parents=True)
    (store / "tenant/params").write_bytes(bytes(2 * MIB))
    config.write_text('metadata_ttl = 600\n[[tenants]]\npath = "tenant"\ncache_size = "1MiB"\n')
    with mounted(store, directory, "--config", str(config)) as found:
        yield OwnDirectory(store, found.path, found)


@pytest.fixture
def model(mount: OwnDirectory) -> OwnDirectory:
    """A model of the test's own in it: a directory with two files and a directory with one."""
    name = f"model-{uuid.uuid4().hex[:12]}"
    own = OwnDirectory(mount.store / name, mount.path / name, mount.mount)
    (own.store / "deep/er").mkdir(parents=True)
    (own.store / "config.json").write_text("{}")
    (own.store / "params").write_bytes(os.urandom(MIB))
    (own.store / "deep/er/shard").write_bytes(os.urandom(MIB))
    assert give(trimsfs, "refresh", own.path).code == 0
    return own


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a command came to."""

    code: int
    out: str
    err: str


def give(group: CommandGroup, *arguments: str | Path) -> Given:
    """Give a command in this process, which takes a tenth of the time."""
    done = CliRunner(env={"TRIMSFS_MOUNTS_DIR": "/nonexistent"}).invoke(group, list(map(str, arguments)))
    return Given(code=done.exit_code, out=done.stdout, err=done.stderr)


def by_stranger(group: CommandGroup, *arguments: str | Path) -> Given:
    """Give a command as a user who has no rights."""
    group.get_command(click.Context(group), str(arguments[0]))  # which imports what this user may not read
    given: Given = as_user(STRANGER, lambda: give(group, *arguments))
    return given


def listed(*arguments: str | Path) -> dict[str, tuple[int, int]]:
    """The files and bytes of each line that ls gives."""
    rows = json.loads(give(trimsfs, "ls", "--json", *arguments).out)
    return {row["path"]: (row["files"], row["size"]) for row in rows}


def test_refresh_shows_at_once_what_was_uploaded_replaced_and_deleted(model: OwnDirectory) -> None:
    assert sorted(os.listdir(model.path)) == ["config.json", "deep", "params"]
    assert (model.path / "deep/er/shard").stat().st_size == MIB
    held = os.open(model.path / "deep", os.O_RDONLY)
    try:
        (model.store / "params").write_bytes(b"replaced")
        (model.store / "new").write_bytes(b"uploaded")
        (model.store / "deep/er/shard").unlink()
        (model.store / "deep/er").rmdir()
        assert (model.path / "params").stat().st_size == MIB
        assert (model.path / "deep/er").is_dir()

        done = give(trimsfs, "refresh", model.path)
        assert (done.code, done.err) == (0, "")

        assert (model.path / "params").read_bytes() == b"replaced"
        assert (model.path / "new").read_bytes() == b"uploaded"
        assert not (model.path / "deep/er").exists()
        assert os.readlink(f"/proc/self/fd/{held}") == str(model.path / "deep"), "what is in use is not dropped"
    finally:
        os.close(held)


def test_refresh_of_what_is_not_known_yet_asks_for_its_directory(model: OwnDirectory) -> None:
    assert not (model.path / "later").exists()
    (model.store / "later").mkdir()
    (model.store / "later/params").write_bytes(b"uploaded")
    assert give(trimsfs, "refresh", model.path / "later").code == 0
    assert (model.path / "later/params").read_bytes() == b"uploaded"
    refused = by_stranger(trimsfs, "refresh", model.path)
    assert (refused.code, "may do this" in refused.err, refused.err.count("\n")) == (11, True, 1), refused


def test_ls_shows_files_totals_and_names_of_a_mount(model: OwnDirectory) -> None:
    name, size = model.path.name, 2 * MIB + 2
    assert listed(model.path / "params") == {str(model.path / "params"): (1, MIB)}
    assert listed(model.path.parent)[str(model.path)] == (3, size)
    assert listed("--mount", model.path.parent)[name] == (3, size)
    assert listed("--mount", model.path, f"{name}/params") == {f"{name}/params": (1, MIB)}
    assert listed(model.path) == {str(model.path): (2, MIB + 2), str(model.path / "deep"): (1, MIB)}
    assert listed("-r", "--mount", model.path, name) == {name: (2, MIB + 2), f"{name}/deep/er": (1, MIB)}
    assert len(listed("--files", model.path)) == 3
    total = give(trimsfs, "ls", model.path).out.splitlines()[-1].split()
    assert total[:4] == ["total", "3", "2.1", "MB"]


def test_a_mount_is_named_by_any_path_on_it(model: OwnDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    mountpoint = model.path.parent
    monkeypatch.chdir(mountpoint.parent)
    for path in ("./models", "models/", f"models/{model.path.name}/params", str(model.path)):
        for group in (trimsfs, mountctl):
            told = give(group, "status", "--json", path)
            assert [facts["mountpoint"] for facts in json.loads(told.out)] == [str(mountpoint)], told
    command = [MOUNTCTL, "logs", "models/", "-n", "1000"]
    assert "serving" in subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    refused = give(trimsfs, "umount", model.path)
    hint = f"no trimsfs mount, but a path on the one at {mountpoint}"
    assert (refused.code, hint in refused.err) == (10, True), refused
    assert give(mountctl, "down", model.path).code == 10


def test_users_who_are_not_root_see_what_is_theirs_to_see(model: OwnDirectory) -> None:
    mountpoint = model.path.parent
    shown = by_stranger(mountctl, "status", mountpoint)
    assert (shown.code, shown.err) == (0, "")
    assert f"serving at {mountpoint}, server pid" in shown.out
    assert "only root and the user who mounted" in shown.out
    for verb, reason in (("logs", "run it as root"), ("restart", "the user who mounted"), ("abort", "as root")):
        refused = by_stranger(mountctl, verb, mountpoint)
        assert (refused.code, refused.out, reason in refused.err, refused.err.count("\n")) == (11, "", True, 1), refused


def test_a_full_tenant_is_named(mount: OwnDirectory) -> None:
    for verb in ("warm", "pin"):
        done = give(trimsfs, verb, mount.path / "tenant")
        told = "tenant tenant is full (cache_size 1 MiB): evict or unpin its models, or raise it"
        assert (done.code, told in done.err, done.err.count("\n")) == (9, True, 1), done
        assert told in mount.mount.log()


def test_what_a_command_has_done_can_be_json(model: OwnDirectory) -> None:
    absent = model.path / "absent"
    told = give(trimsfs, "warm", "--json", model.path, absent)
    lines = {line["path"]: line for line in map(json.loads, told.out.splitlines())}  # the last of each
    assert told.code == 13
    assert (lines[str(model.path)]["state"], lines[str(model.path)]["total_files"]) == ("done", 3)
    assert (lines[str(absent)]["state"], lines[str(absent)]["kind"]) == ("failed", "NoSuchEntryError")
    assert json.loads(give(trimsfs, "refresh", "--json", model.path).out)[0]["path"] == str(model.path)


def test_output_that_is_full_or_that_nobody_reads_ends_every_verb(model: OwnDirectory) -> None:
    for program, verb in ((TRIMSFS, "ls"), (TRIMSFS, "warm"), (TRIMSFS, "status"), (MOUNTCTL, "status")):
        command = [program, verb, str(model.path)]
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (
            1,
            f"{Path(program).name}: standard output: No space left on device\n",
        )
    receiver, sender = os.pipe()
    os.close(receiver)
    with os.fdopen(sender, "wb") as closed:
        command = [TRIMSFS, "ls", str(model.path)]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_a_prefix_with_nothing_under_it_is_told_at_the_mount(tmp_path: Path) -> None:
    (tmp_path / "buckets/bucket/models").mkdir(parents=True)
    (tmp_path / "buckets/bucket/models/params").write_bytes(b"weights")
    with start_fast(tmp_path / "buckets") as server:
        cache = ("--cache-dir", tmp_path / "cache")
        typed = run("mount", "s3://bucket/modles", tmp_path / "m", *cache, environment=server.environment())
        remedy = "check the spelling (an alias is no prefix), or --allow-empty"
        told = f"s3://bucket/modles: there is nothing under it: {remedy}"
        assert (typed.returncode, told in typed.stderr, typed.stderr.count("\n")) == (5, True, 1), typed.stderr
        environment = server.environment()
        with mounted("s3://bucket/modles", tmp_path / "mount", "--allow-empty", environment=environment) as mount:
            assert list(mount.path.iterdir()) == []
            assert "there is nothing under it" in mount.log()
            with pytest.raises(OSError, match="Read-only file system"):
                (mount.path / "new").write_bytes(b"")


@pytest.mark.slow
def test_of_very_many_names_all_are_listed_and_few_take_memory(own_directory: OwnDirectory) -> None:
    """Of those that the kernel gets by name alone, too, number and type are right."""
    count = MANY_INODES + 2000
    for number in range(count):
        (own_directory.store / f"{number}").touch()
    with os.scandir(own_directory.path) as scan:
        listed = {entry.name: (entry.inode(), entry.is_file()) for entry in scan}
    assert len(listed) == count
    assert own_directory.mount.metrics()["trimsfs_names_inodes"] < MANY_INODES + 50
    with (own_directory.path / "0").open("rb") as file:
        for name in list(listed)[-3000:]:  # the kernel has few of them yet
            assert listed[name] == ((own_directory.path / name).stat().st_ino, True)
        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == str(own_directory.path / "0")
    if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 18):
        assert own_directory.mount.metrics()["trimsfs_names_inodes"] < MANY_INODES + 500
