"""Users that must not learn of each other's models, and servers that have nothing of root's."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mountctl.keeper.control_socket import ask
from tests.support.mounts import MountedStore, again_while_copied, mountctl, mounted, trimsfs, wait_until
from tests.support.processes import family, run
from tests.support.users import STRANGER, as_user
from trimsfs.cli.watch.status import status
from trimsfs.fuse.waiters import status_of
from trimsfs.server.sandbox import CAP_DAC_READ_SEARCH

A, B, OPERATORS = 2001, 2002, 2003
USERS = {"a": A, "b": B, "stranger": STRANGER, "operator": OPERATORS}
"""Each is in the group of the same number."""
MIB = 1 << 20


@pytest.fixture
def tenants(store_directory: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """Two tenants' models, one that is everybody's, and each in the cache."""
    for path in ("tenant-a/bert/params", "tenant-b/secret-model/params", "public/resnet50/params"):
        (store_directory / path).parent.mkdir(parents=True)
        (store_directory / path).write_bytes(os.urandom(2 * MIB))
    config = tmp_path / "mount.toml"
    config.write_text(f"control_gid = {OPERATORS}\n")
    for path, group in (("tenant-a", A), ("tenant-b", B)):
        with config.open("a") as text:
            text.write(f'[[access]]\npath = "{path}"\ngid = {group}\nmode = "0440"\n')
            text.write(f'[[tenants]]\npath = "{path}"\ncache_size = "1GiB"\n')
    with mounted(store_directory, tmp_path, "--config", str(config)) as mount:
        assert trimsfs("warm", mount.path).returncode == 0
        yield mount


def look(mount: MountedStore, who: str, *names: str) -> dict[str, Any]:
    """What a user can find at some paths of a mount."""
    found: dict[str, Any] = as_user(USERS[who], lambda: found_at(mount.path, names))
    return found


def found_at(root: Path, names: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    denied = []
    for name in names:
        path = os.path.join(root, name)
        try:
            os.stat(path)
            found[name] = sorted(os.listdir(path)) if os.path.isdir(path) else Path(path).read_bytes().decode("latin-1")
            found[f"{name} xattrs"] = {key: os.getxattr(path, key).decode() for key in os.listxattr(path)}
        except OSError as error:
            denied.append((name, error.errno))
    return {"found": found, "denied": denied}


EVERYWHERE = (
    "",
    "public/resnet50",
    ".trims",
    ".trims/models",
    ".trims/control",
    ".trims/metrics",
    ".trims/.trims",
    ".trims/.trims/info",
    ".trims/.trims/files",
    ".trims/public",
    ".trims/public/info",
    "public/.trims/.trims/info",
)
OF_B = (
    "tenant-b/secret-model",
    "tenant-b/secret-model/params",
    "tenant-b/.trims",
    "tenant-b/.trims/secret-model",
    "tenant-b/.trims/secret-model/info",
    "tenant-b/.trims/secret-model/files",
    "tenant-b/secret-model/.trims/params/info",
    "tenant-b/secret-model/.trims/params/tensors",
    "tenant-b/secret-model/.trims/params/pin",
    ".trims/tenant-b/info",
    ".trims/tenant-b/files",
    ".trims/tenant-b/pin",
    "public/../tenant-b/secret-model/params",
)


def test_a_tenant_finds_nothing_of_another(tenants: MountedStore) -> None:
    for who in ("a", "stranger"):
        seen = look(tenants, who, *EVERYWHERE, *OF_B, "tenant-b")
        assert "secret-model" not in json.dumps(seen["found"])
        assert {name for name, _ in seen["denied"]} >= set(OF_B)
        assert {number for _, number in seen["denied"]} == {13}
    own = look(tenants, "b", *EVERYWHERE, "tenant-b/secret-model/params", ".trims/tenant-b/info")
    assert own["denied"] == []
    assert "secret-model" in own["found"][".trims/models"]
    for name in (".trims/tenant-b/info", ".trims/.trims/files"):
        assert "secret-model" in own["found"][name]
    assert own["found"]["tenant-b/secret-model/params xattrs"]["user.trims.verified"] == "true"


def test_operators_see_all_and_others_no_options(tenants: MountedStore) -> None:
    seen = look(tenants, "operator", ".trims/models", ".trims/control")["found"]
    assert "secret-model" in seen[".trims/models"]
    assert "tenants" in json.loads(seen[".trims/control"])["options"]
    assert "options" not in json.loads(look(tenants, "a", ".trims/control")["found"][".trims/control"])
    assert "tenant-b" not in look(tenants, "a", ".trims/metrics")["found"][".trims/metrics"]
    assert b'trimsfs_disk_tenant_used_bytes{tenant="tenant-b"}' in (tenants.path / ".trims/metrics").read_bytes()


def test_what_the_kernel_remembers_lets_nobody_in(tenants: MountedStore) -> None:
    """Root has just looked everything up, and another user asks for the same names."""
    assert (tenants.path / "tenant-b/secret-model/params").read_bytes()
    assert look(tenants, "a", "tenant-b/secret-model/params")["found"] == {}


def test_changed_rules_are_in_force_after_an_upgrade(tmp_path: Path, store_directory: Path) -> None:
    (store_directory / "tenant-b").mkdir()
    (store_directory / "tenant-b/secret-model").write_bytes(b"weights")
    declared = tmp_path / "mounts.d"
    declared.mkdir()
    lines = [f'store = "{store_directory}"', f'cache_dir = "{tmp_path / "cache"}"']
    file, mount = declared / "models.toml", MountedStore(tmp_path / "models", tmp_path / "cache")
    file.write_text("\n".join([f'mountpoint = "{mount.path}"', *lines]))

    def control(*arguments: str) -> None:
        done = again_while_copied(lambda: mountctl(*arguments, "--mounts-dir", declared))
        assert done.returncode == 0, done.stderr

    control("up")
    try:
        assert look(mount, "a", "tenant-b/secret-model")["denied"] == []
        with file.open("a") as text:
            text.write(f'\n[[access]]\npath = "tenant-b"\ngid = {B}\nmode = "0440"\n')
        control("upgrade", "models")
        wait_until(lambda: look(mount, "a", "tenant-b/secret-model")["found"] == {})
        assert look(mount, "b", "tenant-b/secret-model")["denied"] == []
    finally:
        control("down")


def test_servers_have_nothing_of_roots(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(os.urandom(9 * MIB))
    with mounted(store_directory, tmp_path, "--cold-open", "wait") as mount:
        assert len((mount.path / "model").read_bytes()) == 9 * MIB
        facts = mount.control()
        assert facts["passthrough"] == {"used": True}
        assert mount.info("model")["passthrough"]
        wait_until(lambda: bool(ask(mount.path, {"do": "status"}, timeout_s=5)["standby"]), timeout_s=30)
        processes = family(facts["keeper_pid"])
        assert len(processes) >= 6
        for pid in processes[1:]:
            status = status_of(pid)
            assert set(status["Uid"].split()) == set(status["Gid"].split()) == {facts["options"]["server_user"]}
            assert status["Groups"] == ""
            held = {kind: int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
            if Path(f"/proc/{pid}/cmdline").read_text().startswith("trimsfs broker"):
                assert held.pop("Prm") == held.pop("Eff") == 1 << CAP_DAC_READ_SEARCH
            assert set(held.values()) == {0}
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert status_of(facts["keeper_pid"])["Uid"].split()[0] == "0"


FENCED = """
import ctypes, errno, os, sys
from pathlib import Path
from trimsfs.server.sandbox import become, fence, identity
allowed, denied, device = map(Path, sys.argv[1:])
become(identity("60874"))
fence([allowed, device])
with device.open("r+b", buffering=0) as file:
    file.write(b"to a device")
(allowed / "file").write_text("in its directory")
(allowed / "file").rename(allowed / "other")
(allowed / "other").unlink()
for attempt in (
    lambda: (denied / "file").write_text("elsewhere"),
    lambda: os.unlink(denied / "theirs"),
    lambda: os.truncate(denied / "theirs", 0),
    lambda: os.rename(denied / "theirs", allowed / "mine"),
    lambda: os.setuid(0),
    lambda: os.setgroups([0]),
):
    try:
        attempt()
    except PermissionError:
        continue
    sys.exit("something was not denied")
libc = ctypes.CDLL(None, use_errno=True)
calls = [lambda: libc.unshare(0x10000000), lambda: libc.ptrace(0, 0, 0, 0), lambda: libc.personality(0)]
for call in calls:
    if call() != -1 or ctypes.get_errno() != errno.EPERM:
        sys.exit("a system call was not denied")
print((denied / "theirs").read_text())
"""


def test_the_fence_denies_what_a_server_never_does(tmp_path: Path) -> None:
    allowed, denied = tmp_path / "allowed", tmp_path / "denied"
    for directory in (allowed, denied):
        directory.mkdir()
        directory.chmod(0o777)
    (denied / "theirs").write_text("can be read")
    (denied / "theirs").chmod(0o666)

    done = run(sys.executable, "-c", FENCED, allowed, denied, "/dev/zero")

    assert (done.returncode, done.stdout) == (0, "can be read\n"), done.stderr


APART = """
import os, sys
from pathlib import Path
from trimsfs.server.sandbox import become, fence, identity, set_apart
become(identity("60874"))
fence([Path(sys.argv[1])])
reader, writer = os.pipe()
standby = os.fork()
if standby == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)
attempts = {
    "signal": lambda: os.kill(standby, 0),
    "memory": lambda: open(f"/proc/{standby}/mem", "r+b").close(),
    "descriptors": lambda: os.readlink(f"/proc/{standby}/fd/{reader}"),
}
for apart in (False, True):
    if apart:
        set_apart([Path(sys.argv[1])])
    for name, attempt in attempts.items():
        try:
            attempt()
        except PermissionError:
            print(name, "denied")
Path(sys.argv[1], "file").write_text("still allowed")
"""


def test_a_server_is_kept_from_the_standby_that_it_has_forked(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = run(sys.executable, "-c", APART, tmp_path)
    expected = "".join(f"{name} denied\n" for name in ("signal", "memory", "descriptors"))
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_a_server_is_no_user_that_does_not_exist(store_directory: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "models"
    command = ("mount", mountpoint, "--store", store_directory, "--cache-dir", tmp_path / "cache")
    assert trimsfs(*command, "--server-user", "nobody-of-this-name").returncode == 2


def test_a_directory_that_is_no_cache_stays_whose_it_is(store_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "precious").write_text("somebody's")
    done = trimsfs("mount", tmp_path / "models", "--store", store_directory, "--cache-dir", tmp_path)
    assert (done.returncode, "choose an empty one" in done.stderr) == (9, True), done.stderr
    assert {path.stat().st_uid for path in (tmp_path, tmp_path / "precious")} == {0}


def test_a_cache_of_another_user_is_taken_over(store_directory: Path, tmp_path: Path) -> None:
    """As after an upgrade from a version whose servers were root, and the other way round."""
    (store_directory / "model").write_bytes(b"weights")
    for user in ("root", "60874", "65534"):
        with mounted(store_directory, tmp_path, "--server-user", user) as mount:
            assert (mount.path / "model").read_bytes() == b"weights"
            fetched = mount.metrics()["trimsfs_fetch_fetched_bytes_total"]
            assert fetched == (7 if user == "root" else 0)
            assert (mount.cache / "index.sqlite").stat().st_uid == (0 if user == "root" else int(user))


@pytest.mark.alone  # looks at all mounts of the host
def test_a_mount_that_its_modes_hide_is_no_mount_that_does_not_answer(store_directory: Path, tmp_path: Path) -> None:
    def told(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(status, arguments)
        return done.exit_code, done.stdout

    with mounted(store_directory, tmp_path, "--mode", "0400") as mount:
        code, text = as_user(STRANGER, lambda: told(str(mount.path)))
        assert (code, f"  hidden from this user: {mount.path}: Permission denied" in text) == (11, True), text
        code, text = as_user(STRANGER, lambda: told("--json"))
        kinds = {facts["mountpoint"]: facts.get("kind") for facts in json.loads(text)}
        assert kinds[str(mount.path)] == "NotPermittedError"
        assert (code == 2) == bool({*kinds.values()} & {"NotMountedError"})
        assert told(str(mount.path))[0] == 0
