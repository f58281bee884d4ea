"""Containers that wait for a mount, sandboxes, and what becomes of both when the server is replaced."""

import os
import signal
from itertools import product
from pathlib import Path

import pytest

from tests.containers.engines import (
    SUB_IDS,
    Podman,
    Users,
    apart,
    mountctl,
    run,
    running,
    write_bundle,
)
from tests.containers.host import Host, entered_by_all
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until
from tests.support.processes import alive, family

MODEL = "resnet50/params"
AS_USER = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")


def propagation(directory: Path) -> list[str]:
    """Of each mount at a directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [" ".join(line.split(" - ")[0].split()[6:]) for line in lines if line.split()[4] == str(directory)]


def test_sharing_is_done_once_and_says_so(tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    directory.mkdir()
    link = tmp_path / "link"
    link.symlink_to(directory)
    try:
        done = mountctl("share", directory)
        assert (done.returncode, done.stdout) == (0, f"{directory} is shared\n"), done.stderr
        (found,) = propagation(directory)
        assert found.startswith("shared:")
        for name in (directory, link, f"{directory}/"):
            done = mountctl("share", name)
            assert (done.returncode, "nothing to do" in done.stdout) == (0, True), done.stderr
        assert propagation(directory) == [found]
        run("mount", "--make-private", directory)
        assert mountctl("share", directory).stdout == f"{directory} is shared\n"
        assert len(propagation(directory)) == 1
    finally:
        run("umount", directory)
    assert propagation(directory) == []


def test_shared_directories_of_a_shared_file_system_are_groups_of_their_own(tmp_path: Path) -> None:
    """Else a mount made below would show in the directory that was there before as well."""
    run("mount", "-t", "tmpfs", "none", tmp_path)
    run("mount", "--make-shared", tmp_path)
    try:
        (tmp_path / "shared").mkdir()
        assert mountctl("share", tmp_path / "shared").returncode == 0
        assert propagation(tmp_path)[0] != propagation(tmp_path / "shared")[0]
    finally:
        run("umount", "--recursive", tmp_path)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("/", 2, "choose a directory for mount points"),
        ("MODELS", 2, "lies on a trimsfs mount"),
        ("MODELS/bert", 2, "lies on a trimsfs mount"),
        ("STORE/bert/params", 2, "not a directory"),
        ("/nonexistent", 13, "create it with `mkdir -p`"),
        ("ABOVE", 4, "is mounted below: unmount it, share"),
    ],
)
def test_what_cannot_be_shared_gives_one_line_and_its_exit_code(
    name: str, code: int, message: str, models: MountedStore, host: Host
) -> None:
    names = {"MODELS": models.path, "STORE": host.store, "ABOVE": host.directory}
    for word, path in names.items():
        name = name.replace(word, str(path))
    before = propagation(host.directory)
    done = mountctl("share", name)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert message in done.stderr
    assert propagation(host.directory) == before


def test_containers_that_run_already_see_a_mount_and_a_mount_made_anew(
    podman: Podman, root: Path, fresh_host: Host, users: Users, tmp_path: Path
) -> None:
    shared = fresh_host.shared
    volume = f"--volume={shared}:{shared}:ro,rslave"
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": str(shared), "type": "bind", "source": str(shared), "options": ["rbind", "rslave", "ro"]},
    ]
    bare = tmp_path / "bare"
    make_bare(root, bare, shared, users)
    bundle = write_bundle(tmp_path / "bundle", bare, ["sleep", "300"], users, mounts=mounts)
    crun = ("crun", "--root", tmp_path / "state", "run", "--bundle", bundle, f"layout-{os.getpid()}")
    with podman.started(*users.podman, volume) as container, running(*apart(*crun)) as process:
        wait_until(lambda: any(in_container(pid, bare) for pid in family(process.pid)[1:]))
        (first,) = [pid for pid in family(process.pid)[1:] if in_container(pid, bare)]
        for _ in range(2):
            assert container.read("find", str(shared), "-type", "f") == ""
            with fresh_host.mounted() as mount:
                path = f"{mount.path}/resnet50/params"
                user = f"{users.user}:{users.user}"
                assert container.read("sha256sum", path, user=user).split()[0] == fresh_host.digest(MODEL)
                assert Path(f"/proc/{first}/root{path}").read_bytes() == fresh_host.content(MODEL)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not alive(first))
    run(*apart("crun", "--root", tmp_path / "state", "delete", "--force", f"layout-{os.getpid()}"))


def make_bare(root: Path, directory: Path, shared: Path, users: Users) -> None:
    run("cp", "-a", root, directory)
    (directory / shared.relative_to("/")).mkdir(parents=True)
    entered_by_all(directory)
    if users.namespace:
        run("chown", "-hR", f"{SUB_IDS}:{SUB_IDS}", directory)


def in_container(pid: int, root: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/root", root) and os.readlink(f"/proc/{pid}/exe") == "/bin/busybox"
    except OSError:
        return False


SANDBOXES = {
    "bubblewrap": ("bwrap", "--ro-bind", "ROOT", "/", "--ro-bind", "MODEL", "/opt", "--proc", "/proc"),
    "bubblewrap-namespace": (
        *("bwrap", "--unshare-user", "--uid", "1000", "--gid", "1000"),
        *("--ro-bind", "ROOT", "/", "--ro-bind", "MODEL", "/opt", "--dev", "/dev"),
    ),
    "unshare": ("unshare", "--mount", "--propagation", "slave"),
    "unshare-namespace": ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork"),
}


# The kernel gives other users than root no mount namespace without a user namespace.
@pytest.mark.parametrize(("sandbox", "as_user"), sorted({*product(SANDBOXES, [False, True])} - {("unshare", True)}))
def test_sandboxes_read_a_model(sandbox: str, as_user: bool, root: Path, models: MountedStore, host: Host) -> None:
    model = models.path / "resnet50"
    command = [text.replace("ROOT", str(root)).replace("MODEL", str(model)) for text in SANDBOXES[sandbox]]
    path = "/opt/params" if command[0] == "bwrap" else f"{model}/params"
    done = run(*(AS_USER if as_user else ()), *command, "sha256sum", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{host.digest('resnet50/params')}  {path}\n"
    if command[0] == "bwrap":
        done = run(*(AS_USER if as_user else ()), *command, "sh", "-c", "echo x >/opt/params")
        assert "Read-only file system" in done.stderr


def test_sandboxes_with_the_shared_directory_see_a_mount_made_later(root: Path, fresh_host: Host) -> None:
    shared = str(fresh_host.shared)
    sandboxes = [
        ("bwrap", "--ro-bind", "/", "/", "--ro-bind", shared, shared),
        ("unshare", "--mount", "--propagation", "slave"),
        (*AS_USER, "unshare", "--user", "--mount", "--propagation", "slave"),
        (*AS_USER, "bwrap", "--ro-bind", "/", "/"),
    ]
    for sandbox in sandboxes:
        with running(*sandbox, "sh", "-c", "echo started; exec sleep 300") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            pid = next(iter(family(process.pid)[1:]), process.pid)
            with fresh_host.mounted() as mount:
                seen = Path(f"/proc/{pid}/root{mount.path}/resnet50/params").read_bytes()
                assert seen == fresh_host.content(MODEL), sandbox
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def model(store_directory: Path) -> Path:
    """A store with a model of two files."""
    (store_directory / "model").mkdir()
    (store_directory / "model/params").write_bytes(b"weights")
    (store_directory / "model/other").write_bytes(b"others")
    return store_directory


def test_containers_go_on_when_the_server_is_killed(podman: Podman, model: Path, tmp_path: Path) -> None:
    with mounted(model, tmp_path) as mount, podman.started(f"--volume={mount.path}/model:/opt:ro") as container:
        assert mountctl("attach", str(container.pid), mount.path / "model", "--at", "/attached").returncode == 0
        server = mount.control()["server_pid"]
        os.kill(server, signal.SIGKILL)
        assert container.read("cat", "/opt/params", "/attached/other") == "weightsothers"
        assert mount.control()["server_pid"] != server


def test_a_model_of_a_mount_that_is_gone_can_be_attached_anew(podman: Podman, model: Path, tmp_path: Path) -> None:
    """Binds of a model, other than those of the parent directory, stay with the mount that they were made of."""
    with mounted(model, tmp_path) as mount:
        path = f"{mount.path}/model/params"
        with podman.started(f"--volume={mount.path}/model:{mount.path}/model:ro") as container:
            assert container.read("cat", path) == "weights"
            facts = mount.control()
            assert mountctl("abort", mount.path).returncode == 0
            wait_until(lambda: not alive(facts["keeper_pid"]))
            done = container.execute("cat", f"{mount.path}/model/other")
            assert done.returncode != 0
            assert "not connected" in done.stderr or "I/O error" in done.stderr
            with mounted(model, tmp_path):
                assert container.execute("cat", path).returncode != 0
                arguments = (str(container.pid), f"{mount.path}/model")
                assert mountctl("attach", *arguments).returncode == 4
                assert mountctl("detach", *arguments).returncode == 0
                done = mountctl("attach", *arguments)
                assert (done.returncode, done.stderr) == (0, "")
                assert container.read("cat", path) == "weights"
                assert mountctl("detach", *arguments).returncode == 0


def test_a_server_serves_on_while_a_container_has_a_model(podman: Podman, model: Path, tmp_path: Path) -> None:
    mountpoint, cache = tmp_path / "models", tmp_path / "cache"
    with podman.started() as container, mounted(model, tmp_path) as mount:
        assert mountctl("attach", str(container.pid), mount.path / "model", "--at", "/opt").returncode == 0
        facts = mount.control()
        assert trimsfs("umount", "--lazy", mountpoint).returncode == 0
        assert container.read("cat", "/opt/params") == "weights"
        done = trimsfs("mount", mountpoint, "--store", model, "--cache-dir", cache)
        assert (done.returncode, "in use by another server" in done.stderr) == (8, True)
        assert mountctl("detach", str(container.pid), "/opt").returncode == 0
        wait_until(lambda: not alive(facts["keeper_pid"]))
        done = trimsfs("mount", mountpoint, "--store", model, "--cache-dir", cache)
        assert done.returncode == 0, done.stderr
