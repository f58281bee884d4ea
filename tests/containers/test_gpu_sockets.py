"""The socket of the clients of GPU copies, in containers; the test stands in for the server that listens there."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountctl.linux.cdi_specs import device_name
from mountctl.linux.sockets import gpu_path, listen_at
from tests.containers.engines import Podman, PodmanContainer, Users, bundle, mountctl, run_bundle, spec_of
from tests.support.mounts import MountedStore


class Listener:
    """Where clients connect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listen()

    def heard(self) -> bytes:
        """What the next client has sent."""
        end, _ = self._socket.accept()
        with end:
            return end.recv(64)

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()

    def made_anew(self) -> None:
        """Be another at the same path, as with a mount that is made anew."""
        self.close()
        self._listen()

    def _listen(self) -> None:
        self._socket = listen_at(self.path, socket.SOCK_SEQPACKET, mode=0o666, backlog=8)
        self._socket.settimeout(10)


@pytest.fixture
def listener(models: MountedStore) -> Iterator[Listener]:
    """The socket of the mount."""
    found = Listener(gpu_path(models.path))
    yield found
    found.close()


def test_a_container_that_asks_for_it_can_connect(
    podman: Podman,
    models: MountedStore,
    users: Users,
    listener: Listener,
    devices: Path,
) -> None:
    done = mountctl("cdi", models.path, "--output", devices / "trimsfs-models.json")
    assert done.returncode == 0, done.stderr
    options = ["--device=trimsfs.dev/models=bert", "--device=trimsfs.dev/models=gpu"]
    command = ("probe", "connect", str(listener.path))
    assert podman.run(*users.podman, *options, command=command) == "connected\n"
    assert listener.heard() == b"hello"
    done = podman("run", "--rm", options[0], podman.image, *command)
    assert done.stdout == "connect: No such file or directory\n"


def test_no_device_is_a_socket_that_does_not_exist(models: MountedStore) -> None:
    def names() -> set[str]:
        return {device["name"] for device in spec_of(models.path)["devices"]}

    without = names()
    assert "gpu" not in without
    path = gpu_path(models.path)
    path.write_text("no socket")
    try:
        assert names() == without
    finally:
        path.unlink()
    listener = Listener(path)
    try:
        assert names() == without | {"gpu"}
    finally:
        listener.close()


def test_no_model_can_take_its_name() -> None:
    assert device_name("gpu") != "gpu"
    assert device_name("a/gpu") == "a:gpu"


@pytest.mark.parametrize("runtime", ["crun", "runc"])
@pytest.mark.parametrize(
    ("gpu", "wanted", "output"),
    [
        ("true", "bert", "connected\n"),
        ("true", None, "connected\n"),
        ("false", "bert", "connect: No such file or directory\n"),
    ],
)
def test_a_bundle_gets_it_by_an_annotation_with_models_and_alone(
    runtime: str,
    gpu: str,
    wanted: str | None,
    output: str,
    models: MountedStore,
    listener: Listener,
    own_root: Path,
    tmp_path: Path,
) -> None:
    script = f"probe connect {listener.path}; grep -c fuse.trimsfs /proc/self/mounts"
    done = run_bundle(runtime, bundle(tmp_path, own_root, script, models=wanted, mount=models.path, gpu=gpu))
    assert (done.stdout, done.stderr) == (f"{output}{0 if wanted is None else 1}\n", "")
    if gpu == "true":
        assert listener.heard() == b"hello"


def test_podman_runs_the_hook_for_it_alone(
    podman: Podman, hooks: Path, models: MountedStore, users: Users, listener: Listener
) -> None:
    options = [f"--annotation=dev.trimsfs.mount={models.path}", "--annotation=dev.trimsfs.gpu=true"]
    command = ("probe", "connect", str(listener.path))
    done = podman(f"--hooks-dir={hooks}", "run", "--rm", *users.podman, *options, podman.image, *command)
    assert (done.returncode, done.stdout) == (0, "connected\n"), done.stderr
    assert listener.heard() == b"hello"


@pytest.mark.parametrize(
    ("gpu", "message"), [("yes", "annotation dev.trimsfs.gpu: 'yes'"), ("true", "models has no GPU: `trimsfs status ")]
)
def test_what_the_annotation_cannot_give_is_refused(
    gpu: str,
    message: str,
    models: MountedStore,
    own_root: Path,
    tmp_path: Path,
) -> None:
    done = run_bundle("runc", bundle(tmp_path, own_root, "echo started", models="bert", mount=models.path, gpu=gpu))
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert message in done.stderr


def test_a_running_container_can_be_given_it_and_again(
    podman: Podman, models: MountedStore, users: Users, listener: Listener
) -> None:
    with podman.started(*users.podman) as container:
        for _ in range(2):
            done = mountctl("attach", str(container.pid), listener.path)
            assert (done.returncode, done.stderr) == (0, "")
            assert connect(container, listener.path) == "connected\n"
            assert listener.heard() == b"hello"
            done = mountctl("attach", str(container.pid), listener.path)
            assert (done.returncode, "mountctl detach" in done.stderr) == (4, True)
            listener.made_anew()
            assert connect(container, listener.path) == "connect: Connection refused\n"
            done = mountctl("detach", str(container.pid), listener.path)
            assert (done.returncode, done.stderr) == (0, "")
            assert connect(container, listener.path) != "connected\n"


def connect(container: PodmanContainer, path: Path) -> str:
    return container.execute("probe", "connect", str(path)).stdout


def test_no_other_socket_is_given_to_containers(podman: Podman, models: MountedStore, tmp_path: Path) -> None:
    other = Listener(tmp_path / "x.gpu")
    try:
        with podman.started() as container:
            for path in (other.path, gpu_path(models.path).with_suffix(".sock")):
                done = mountctl("attach", str(container.pid), path, "--at", "/opt/socket")
                assert (done.returncode, "not on a trimsfs mount" in done.stderr) == (10, True), path
    finally:
        other.close()
