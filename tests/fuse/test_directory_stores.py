"""Directories as stores that are for root alone, as its Hugging Face cache, or hold what who mounts may not read."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.support.keepers import roles, serving
from tests.support.mounts import MountedStore, let_in, mounted, trimsfs, wait_until
from tests.support.users import SERVER_USER, STRANGER, as_user
from trimsfs.cli.diagnosis import checks, doctor
from trimsfs.options import MountOptions

MODEL, CONFIG = os.urandom(9 << 20), b'{"model_type": "llama"}'
SNAPSHOTS = "models--org--name/snapshots"
WITHOUT_THE_CAPABILITY = ("setpriv", "--bounding-set=-dac_read_search")
"""A root as in some containers, which may not read everything."""
NOBODY = 65534
"""A user of the password file, as `fusermount3` wants one."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A Hugging Face cache of root's, and its mount."""

    store: Path
    mount: MountedStore


def make_hub(home: Path) -> Path:
    """What `huggingface_hub` leaves of two revisions of a model, in a directory that only root may enter."""
    home.mkdir(mode=0o700)
    hub = home / ".cache/huggingface/hub"
    blobs = hub / "models--org--name/blobs"
    blobs.mkdir(parents=True)
    for name, content in (("aaaa", MODEL), ("bbbb", CONFIG)):
        (blobs / name).write_bytes(content)
        (blobs / name).chmod(0o600)
    for revision in ("r1", "r2"):
        (hub / SNAPSHOTS / revision).mkdir(parents=True)
        (hub / SNAPSHOTS / revision / "model.safetensors").symlink_to("../../blobs/aaaa")
        (hub / SNAPSHOTS / revision / "config.json").symlink_to(blobs / "bbbb")
    (hub / "version.txt").write_text("1")
    (hub / "version.txt").chmod(0o600)
    (hub / "out").symlink_to("/etc/shadow")
    return hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A cache of root's, mounted as any directory is."""
    directory = tmp_path_factory.mktemp("hub")
    store = make_hub(directory / "root")
    options = ("--metadata-ttl", "0.2", "--cold-open", "wait")
    with mounted(f"file://{store}", directory / "mount", *options) as mount:
        yield Hub(store, mount)


def test_what_only_root_may_read_is_read_and_shown_as_other_files_are(hub: Hub) -> None:
    """All users may read what root mounts, unless the mount is told otherwise."""
    mount = hub.mount
    assert sorted(os.listdir(mount.path)) == ["models--org--name", "version.txt"]
    assert (mount.path / "version.txt").read_text() == "1"
    for revision in ("r1", "r2"):
        snapshot = mount.path / SNAPSHOTS / revision
        assert sorted(os.listdir(snapshot)) == ["config.json", "model.safetensors"]
        assert (snapshot / "config.json").read_bytes() == CONFIG
        assert (snapshot / "model.safetensors").read_bytes() == MODEL
        assert as_user(STRANGER, (snapshot / "config.json").read_bytes) == CONFIG
    assert mount.info(f"{SNAPSHOTS}/r1/model.safetensors")["passthrough"]
    with pytest.raises(FileNotFoundError):
        (mount.path / "out").read_bytes()
    late = hub.store / "late.safetensors"  # as `safetensors` saves it
    late.write_bytes(b"adapter")
    late.chmod(0o600)
    wait_until((mount.path / late.name).exists)
    assert (mount.path / late.name).read_bytes() == b"adapter"


def test_a_blob_that_two_snapshots_link_to_is_cached_once(hub: Hub) -> None:
    mount = hub.mount
    first, second = (mount.path / SNAPSHOTS / revision / "model.safetensors" for revision in ("r1", "r2"))
    assert trimsfs("evict", mount.path).returncode == 0
    before = mount.metrics()
    assert first.read_bytes() == MODEL
    assert second.read_bytes() == MODEL
    after = mount.metrics()
    assert after["trimsfs_fetch_fetched_bytes_total"] - before["trimsfs_fetch_fetched_bytes_total"] in range(
        len(MODEL), len(MODEL) + len(CONFIG) + 100
    )
    assert after["trimsfs_disk_used_bytes"] < 2 * len(MODEL)
    of_first, of_second = (mount.info(f"{SNAPSHOTS}/{revision}/model.safetensors") for revision in ("r1", "r2"))
    assert of_first["generation"] == of_second["generation"]
    assert (of_first["path"], of_second["path"]) == tuple(
        f"{SNAPSHOTS}/{revision}/model.safetensors" for revision in ("r1", "r2")
    )
    assert of_second["residency"]["disk"] == len(MODEL)
    assert of_second["passthrough"]


def test_commands_find_a_blob_by_each_link(hub: Hub) -> None:
    """As `pin` of one snapshot and `unpin` of it after a restart, when the server has not listed it yet."""
    mount = hub.mount
    snapshot, other = mount.path / SNAPSHOTS / "r1", mount.path / SNAPSHOTS / "r2"
    assert trimsfs("pin", "--best-effort", snapshot).returncode == 0
    assert mount.info(f"{SNAPSHOTS}/r2/model.safetensors")["pinned"]
    listed = trimsfs("ls", other)
    assert (listed.returncode, "yes" in listed.stdout, "100%" in listed.stdout) == (0, True, True), listed.stdout
    assert trimsfs("evict", other).returncode != 0
    assert trimsfs("unpin", other).returncode == 0
    assert not mount.info(f"{SNAPSHOTS}/r1/model.safetensors")["pinned"]
    assert trimsfs("evict", other).returncode == 0
    assert mount.info(f"{SNAPSHOTS}/r1/model.safetensors")["residency"]["disk"] == 0


def test_a_broker_that_is_killed_is_followed_by_another(hub: Hub) -> None:
    server = serving(hub.mount)
    (broker,) = (pid for pid, role in roles(hub.mount).items() if role == "broker")
    os.kill(broker, signal.SIGKILL)
    serving(hub.mount, not_by=server)
    assert trimsfs("evict", hub.mount.path).returncode == 0
    assert (hub.mount.path / "version.txt").read_text() == "1"
    assert "broker has ended" in hub.mount.log()


def test_a_cache_below_a_directory_for_root_alone_is_refused_with_the_remedy(hub: Hub, tmp_path: Path) -> None:
    home = hub.store.parents[2]
    cache = home / ".cache/trimsfs"
    done = trimsfs("mount", hub.store, tmp_path / "models", "--cache-dir", cache, "--log-file", tmp_path / "log")
    assert (done.returncode, done.stderr.count("\n")) == (9, 1), done.stderr
    assert f"cache directory {cache}: the server, uid " in done.stderr
    assert f", may not enter {home}: " in done.stderr
    assert "set --cache-dir or --server-user" in done.stderr
    assert not os.path.ismount(tmp_path / "models")
    with pytest.raises(checks.ProblemError, match=f"uid {SERVER_USER}, may not enter {home}: set --cache-dir or"):
        doctor._cache(MountOptions(cache_dir=cache, server_user=str(SERVER_USER)))
    assert doctor._cache(MountOptions(cache_dir=cache)).startswith(f"{cache}: free")


@dataclass(frozen=True, slots=True)
class Limited:
    """A store of root's of which who mounts it may not read all, and its mount.

    ``remedy`` is what its messages say, ``reader`` a user who may read the mount.
    """

    store: Path
    mount: Path
    reader: int
    remedy: str
    run: Callable[..., "subprocess.CompletedProcess[str]"]

    def log(self) -> str:
        return (self.mount.parent / "log").read_text()


def may_run_programs() -> bool:
    """Whether users may run this interpreter, which may lie in root's home."""
    may: bool = as_user(NOBODY, lambda: os.access(os.path.realpath(sys.executable), os.R_OK | os.X_OK))
    return may


@pytest.fixture(scope="module", params=["user", "root without the capability"])
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """Mounted by a user, or by a root that may read no more than its server's user."""
    user = request.param == "user"
    if user and not may_run_programs():
        pytest.skip("the interpreter is for root alone")
    directory = tmp_path_factory.mktemp("limited")
    let_in(directory)
    store, home = directory / "store", directory / "home"
    (store / "closed").mkdir(parents=True)
    (store / "model").write_bytes(b"weights")
    for secret in ("secret", "closed/secret"):
        (store / secret).write_bytes(b"of root")
        (store / secret).chmod(0o600)
    (store / "link").symlink_to("closed/secret")
    (store / "named").mkdir()
    (store / "named/model").write_bytes(b"weights")
    (store / "named").chmod(0o744)
    (store / "closed").chmod(0o700)
    home.mkdir()
    places = ("--cache-dir", home / "cache", "--log-file", home / "log", "--metadata-ttl", "0.2")
    run = partial(trimsfs, before=WITHOUT_THE_CAPABILITY)
    remedy = f"Permission denied: let uid {SERVER_USER} read it, or set --server-user root"
    mode = Path("/dev/fuse").stat().st_mode
    if user:
        os.chown(home, NOBODY, NOBODY)
        Path("/dev/fuse").chmod(0o666)  # as udev leaves it on any host that has udev
        run = partial(trimsfs, user=NOBODY)
        remedy = f"Permission denied: let uid {NOBODY} read it, or mount as root"
    try:
        done = run("mount", store, home / "models", *places)
        assert done.returncode == 0, done.stderr
        yield Limited(store, home / "models", NOBODY if user else STRANGER, remedy, run)
    finally:
        run("umount", home / "models")
        Path("/dev/fuse").chmod(mode)


def test_who_mounts_reads_no_more_than_is_allowed_and_sees_what_there_is(limited: Limited) -> None:
    """Never is a file shown as one that does not exist."""
    path = limited.mount

    def read() -> dict[str, object]:
        found: dict[str, object] = {"": sorted(os.listdir(path)), "named/": os.listdir(path / "named")}
        for name in ("model", "secret", "closed/secret", "link", "named/model", "absent"):
            try:
                found[name] = (path / name).read_bytes()
            except OSError as error:
                found[name] = error.errno
        try:
            os.listdir(path / "closed")
        except OSError as error:
            found["closed/"] = error.errno
        return found

    assert as_user(limited.reader, read) == {
        "": ["closed", "link", "model", "named", "secret"],
        "named/": ["model"],
        "model": b"weights",
        **dict.fromkeys(("secret", "closed/secret", "link", "named/model", "closed/"), errno.EACCES),
        "absent": errno.ENOENT,
    }
    for name in ("secret", "closed", "closed/secret", "named/model"):
        assert f"{limited.store}/{name}: {limited.remedy}" in limited.log()


def test_commands_on_what_may_not_be_read_fail_for_that_alone(limited: Limited) -> None:
    path = limited.mount
    done = limited.run("warm", path / "named")
    assert (done.returncode, f"{limited.store}/named/model: {limited.remedy}" in done.stderr) == (6, True), done.stderr
    assert limited.run("warm", path / "model").returncode == 0
    listed = limited.run("ls", "--files", path)
    assert (listed.returncode, "link" in listed.stdout, "secret" in listed.stdout) == (0, True, True), listed.stderr


def test_a_store_that_may_not_be_entered_is_refused_at_the_mount(limited: Limited) -> None:
    home = limited.mount.parent
    for name in ("closed", "closed/secret", "named"):
        store = limited.store / name
        places = ("--cache-dir", home / "other", "--log-file", home / "other.log")
        done = limited.run("mount", store, home / "others", *places)
        assert (done.returncode, done.stderr.count("\n")) == (6, 1), done.stderr
        assert f"{store}: {limited.remedy}" in done.stderr
