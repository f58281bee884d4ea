"""What each container needs: the manifests run as they are, and each privilege taken away shows what is lost.

Real mounts, in containers of crun's. The capability SYS_RESOURCE is not given where the tests themselves lack it.
"""

import copy
import json
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from tests.csi.driver import needs_root
from tests.kubernetes.manifests import ROOT, Manifest, pod_of
from tests.kubernetes.pods import MOUNTPOINT, TIMEOUT_S, Container, Node, Pod, a_node, own_capabilities
from tests.support.mounts import wait_until

pytestmark = [needs_root, pytest.mark.alone]  # its namespaces hold copies of others' mounts

FILES = {
    "resnet50/params": os.urandom(20_000_000),
    "resnet50/labels": b"cat\n",
    "private/params": b"root's",
    "other/params": b"root's",
}

Change = Callable[[Pod], None]
Healthy = tuple[Node, Container, Pod, Container]
"""A node, its keeper, its other pod, and the server of that."""


def unchanged(_: Pod) -> None:
    """As in the manifest."""


@contextmanager
def node() -> Iterator[Node]:
    """A node whose store has a file that only root may read. Its paths are short: sockets' names have 107 bytes."""
    with (
        tempfile.TemporaryDirectory(prefix="k8s-", ignore_cleanup_errors=True) as directory,
        a_node(Path(directory), FILES) as found,
    ):
        for name in ("private/params", "other/params"):
            (found.store / name).chmod(0o600)
        yield found


def keeper_of(on: Node, change: Change = unchanged) -> Container:
    """Start the keeper on a node."""
    pod = Pod(on, "keeper", copy.deepcopy(pod_of("trimsfs-keeper")))
    change(pod)
    return pod.start("keeper")


def pod_on(on: Node, change: Change = unchanged) -> Pod:
    """The pod with server and driver."""
    pod = Pod(on, "trimsfs", copy.deepcopy(pod_of("trimsfs")))
    change(pod)
    return pod


def without_capability(name: str, capability: str) -> Change:
    """Takes a capability from a container that has some."""
    return lambda pod: pod.container(name)["securityContext"]["capabilities"]["add"].remove(capability)


def unprivileged(name: str, *capabilities: str) -> Change:
    """Leaves a privileged container these capabilities alone."""

    def change(pod: Pod) -> None:
        context = pod.container(name)["securityContext"]
        del context["privileged"]
        context["capabilities"] = {"drop": ["ALL"], "add": list(capabilities)}

    return change


def without_volume(name: str, volume: str) -> Change:
    """Takes a volume from a container."""

    def change(pod: Pod) -> None:
        mounts = pod.container(name)["volumeMounts"]
        mounts[:] = [each for each in mounts if each["name"] != volume]

    return change


def propagation(name: str, volume: str, mode: str | None) -> Change:
    """Gives a volume of a container another propagation."""

    def change(pod: Pod) -> None:
        (mount,) = [each for each in pod.container(name)["volumeMounts"] if each["name"] == volume]
        mount.pop("mountPropagation")
        if mode is not None:
            mount["mountPropagation"] = mode

    return change


def without_host_pid(pod: Pod) -> None:
    """Gives a pod a PID namespace of its own."""
    del pod.spec["hostPID"]


def facts(on: Node) -> dict[str, object]:
    """What the server says of itself."""
    found: dict[str, object] = json.loads((on.mountpoint / ".trims/control").read_text())
    return found


def read(on: Node, name: str) -> bytes:
    """A file, read on the host through the mount."""
    return (on.mountpoint / name).read_bytes()


@pytest.fixture(scope="module")
def healthy() -> Iterator[Healthy]:
    """A node with keeper, server and driver, all as the manifests have them."""
    with node() as on:
        keeper = keeper_of(on).ready()
        pod = pod_on(on)
        server = pod.start("server").ready()
        yield on, keeper, pod, server


def test_as_in_the_manifests_pods_read_everything(healthy: Healthy) -> None:
    on, keeper, pod, server = healthy
    assert {name: read(on, name) for name in FILES if name != "other/params"} == {
        name: content for name, content in FILES.items() if name != "other/params"
    }
    assert facts(on)["passthrough"] == {"used": True}
    driver = pod.start("csi")
    volume = on.publish("pod-1", "resnet50")
    driver.kill()
    assert {path.name: path.read_bytes() for path in volume.iterdir()} == {
        "params": FILES["resnet50/params"],
        "labels": b"cat\n",
    }
    for container in (keeper, server):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container.probe(probe) == 0, (container.name, probe)


@pytest.mark.slow
def test_another_server_takes_over_with_the_cache_of_the_first(healthy: Healthy) -> None:
    on, _, _, _ = healthy
    read(on, "resnet50/params")
    fetched = sum(1 for _ in (on.host / "var/cache/trimsfs/models/blobs").rglob("*"))
    with (on.mountpoint / "resnet50/params").open("rb") as file, another(healthy, unchanged) as server:
        server.serving()
        assert file.read() == FILES["resnet50/params"]
        assert read(on, "resnet50/params") == FILES["resnet50/params"]
    assert sum(1 for _ in (on.host / "var/cache/trimsfs/models/blobs").rglob("*")) == fetched


def test_the_server_ends_up_without_any_privilege(healthy: Healthy) -> None:
    on, _, _, _ = healthy
    status = Path(f"/proc/{facts(on)['server_pid']}/status").read_text()
    for field in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert re.search(rf"^{field}:\s*0+$", status, re.MULTILINE), field
    assert re.search(r"^NoNewPrivs:\s*1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s*2$", status, re.MULTILINE)
    assert not re.search(r"^Uid:\s*0\b", status, re.MULTILINE)


@contextmanager
def another(healthy: Healthy, change: Change) -> Iterator[Container]:
    """Another server beside that of the manifests, which serves again afterwards."""
    on, _, _, _ = healthy
    server = pod_on(on, change).start("server")
    try:
        yield server
    finally:
        server.kill()
        wait_until((on.mountpoint / ".trims/control").exists, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (without_capability("server", "SETUID"), 2, "let the container have SETUID and SETGID"),
        (without_capability("server", "SETGID"), 2, "let the container have SETUID and SETGID"),
        (without_volume("server", "config"), 2, "/etc/trimsfs/config.toml"),
    ],
    ids=["SETUID", "SETGID", "config"],
)
def test_a_server_does_not_start_without(healthy: Healthy, change: Change, code: int, words: str) -> None:
    with another(healthy, change) as server:
        assert server.ended() == code
        assert words in server.said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_capability("server", "CHOWN"), "/var/cache/trimsfs/models: Operation not permitted"),
        (without_volume("server", "cache"), "/var/cache/trimsfs/models: Read-only file system"),
    ],
    ids=["CHOWN", "cache"],
)
@pytest.mark.slow
def test_the_first_server_of_a_mount_does_not_start_without_its_cache(change: Change, words: str) -> None:
    with node() as on:
        keeper_of(on).ready()
        server = pod_on(on, change).start("server")
        assert server.ended() == 9
        assert words in server.said


@pytest.mark.slow
def test_without_dac_read_search_a_directory_store_shows_no_private_files(healthy: Healthy) -> None:
    on, _, _, _ = healthy
    with another(healthy, without_capability("server", "DAC_READ_SEARCH")) as server:
        server.serving()
        assert read(on, "resnet50/labels") == b"cat\n"
        with pytest.raises(PermissionError):
            read(on, "other/params")
        assert "other/params: Permission denied: let uid 60874 read it" in server.said


@pytest.mark.slow
def test_without_setpcap_the_server_could_be_given_capabilities_again(healthy: Healthy) -> None:
    on, _, _, _ = healthy
    with another(healthy, without_capability("server", "SETPCAP")) as server:
        server.serving()
        status = Path(f"/proc/{facts(on)['server_pid']}/status").read_text()
        assert re.search(r"^CapEff:\s*0+$", status, re.MULTILINE)
        assert not re.search(r"^CapBnd:\s*0+$", status, re.MULTILINE)


def pin(server: Container) -> tuple[int, str]:
    """The exit code of a pin of 20 MB, and what it says."""
    done = server.execute("trimsfs", "pin", f"{MOUNTPOINT}/resnet50")
    return done.returncode, done.stderr


@pytest.mark.slow
def test_without_sys_resource_pins_are_not_locked_in_memory(healthy: Healthy) -> None:
    with another(healthy, without_capability("server", "SYS_RESOURCE")) as server:
        code, said = pin(server.serving())
        assert (code, said.count("\n")) == (9, 1)
        assert "pinned on disk, not locked in memory" in said
    _, _, _, with_it = healthy
    assert pin(with_it)[0] == (0 if "SYS_RESOURCE" in own_capabilities() else 9)


@pytest.mark.slow
def test_without_kill_a_server_that_is_stopped_leaves_its_servers_to_the_runtime(healthy: Healthy) -> None:
    on, _, _, _ = healthy
    with another(healthy, without_capability("server", "KILL")) as server:
        left = facts(server.serving().node)["server_pid"]
        assert on.crun("kill", server.name, "TERM").returncode == 0
        wait_until(lambda: "let the container have KILL" in server.said, timeout_s=TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.kill(int(str(left)), signal.SIGKILL)


@pytest.mark.slow
def test_a_server_without_the_keeper_s_socket_says_so_after_a_minute(healthy: Healthy) -> None:
    with another(healthy, without_volume("server", "run")) as server:
        assert server.process.wait(2 * TIMEOUT_S) == 10
        assert "no keeper listens at /run/trimsfs/var-lib-trimsfs-mounts-models.servers" in server.said


@pytest.mark.slow
def test_a_server_that_does_not_see_the_mount_serves_and_fails_its_probes(healthy: Healthy) -> None:
    on, _, _, _ = healthy
    with another(healthy, without_volume("server", "mounts")) as server:
        server.serving()
        assert read(on, "resnet50/labels") == b"cat\n"
        assert server.probe("readinessProbe") == 10
        assert server.probe("startupProbe") == server.probe("livenessProbe") == 1


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (without_host_pid, 1, "run the keeper in the host's PID namespace (hostPID: true)"),
        (without_volume("keeper", "fuse"), 3, "/dev/fuse does not exist"),
        (unprivileged("keeper", "KILL"), 3, "root lacks CAP_SYS_ADMIN"),
    ],
    ids=["hostPID", "fuse", "SYS_ADMIN"],
)
@pytest.mark.slow
def test_a_keeper_that_lacks_something_tells_the_server_what(change: Change, code: int, words: str) -> None:
    with node() as on:
        keeper_of(on, change).ready()
        server = pod_on(on).start("server")
        assert server.ended() == code
        assert words in server.said


@pytest.mark.slow
def test_a_keeper_needs_two_capabilities_and_privileged_is_for_propagation_and_read_ahead() -> None:
    with node() as on:
        keeper = keeper_of(on, unprivileged("keeper", "SYS_ADMIN", "KILL")).ready()
        pod_on(on).start("server").ready()
        assert {name: read(on, name) for name in FILES} == FILES
        assert facts(on)["passthrough"] == {"used": True}
        assert "cannot raise the read-ahead" in keeper.said


@pytest.mark.slow
def test_a_mount_that_does_not_reach_the_host_or_the_server_fails_the_probes_of_the_server() -> None:
    with node() as on:
        keeper_of(on, propagation("keeper", "mounts", "HostToContainer")).ready()
        server = pod_on(on).start("server").serving()
        assert not (on.mountpoint / ".trims/control").exists()
        assert server.probe("startupProbe") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [(unprivileged("csi"), "Operation not permitted"), (without_volume("csi", "mounts"), "there is no mount")],
    ids=["SYS_ADMIN", "mounts"],
)
def test_a_driver_that_lacks_something_refuses_volumes(healthy: Healthy, change: Change, words: str) -> None:
    on, _, _, _ = healthy
    driver = pod_on(on, change).start("csi")
    try:
        with pytest.raises(grpc.RpcError) as refused:
            on.publish("pod-2", "resnet50")
        assert words in str(refused.value.details())
    finally:
        driver.kill()


@pytest.mark.slow
def test_a_driver_whose_mounts_do_not_reach_the_host_gives_empty_volumes(healthy: Healthy) -> None:
    on, _, _, _ = healthy
    driver = pod_on(on, propagation("csi", "pods", "HostToContainer")).start("csi")
    try:
        assert list(on.publish("pod-3", "resnet50").iterdir()) == []
    finally:
        driver.kill()


def test_what_is_dropped_everywhere_else_is_in_the_manifests() -> None:
    privileged = {("trimsfs-keeper", "keeper"), ("trimsfs", "csi")}
    for daemonset in ("trimsfs-keeper", "trimsfs"):
        pod = pod_of(daemonset)
        assert not {"hostNetwork", "hostIPC"} & pod.keys()
        assert not pod["automountServiceAccountToken"]
        for each in pod["containers"]:
            context: Manifest = each["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context.get("privileged", False) == ((daemonset, each["name"]) in privileged)
            if not context.get("privileged"):
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"]["drop"] == ["ALL"]


def test_the_page_has_the_same_table() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \|", text, re.MULTILINE)}
    for daemonset in ("trimsfs-keeper", "trimsfs"):
        for each in pod_of(daemonset)["containers"]:
            context = each["securityContext"]
            added = context.get("capabilities", {}).get("add", [])
            told = rows[each["name"]][0]
            assert set(re.findall(r"`([A-Z_]+)`", told)) == set(added), each["name"]
            assert ("privileged" in told) == context.get("privileged", False)
