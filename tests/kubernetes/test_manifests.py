"""The manifests agree with each other and with the code. What a cluster would say of them is not tested."""

import re
import tomllib
from pathlib import Path

import pytest

from mountctl.extras.csi import DRIVER_NAME
from mountctl.extras.csi.csi_command import csi
from mountctl.extras.csi.tenants import check_tenant
from tests.kubernetes.manifests import (
    EXAMPLES,
    KUBERNETES,
    ROOT,
    Manifest,
    container,
    installed,
    of_kind,
    pod_of,
)
from tests.services.web_identity import AUDIENCE
from trimsfs.options import load_options

MOUNTPOINT = "/var/lib/trimsfs/mounts/models"
DAEMONSETS = ("trimsfs-keeper", "trimsfs")


@pytest.fixture
def keeper() -> Manifest:
    """The pod that holds the mounts of a node."""
    return pod_of("trimsfs-keeper")


@pytest.fixture
def pod() -> Manifest:
    """The pod with a node's servers and driver."""
    return pod_of("trimsfs")


def options(arguments: list[str]) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


def paths(pod: Manifest) -> dict[str, str]:
    """The directories of the host that a pod has, by the names of their volumes."""
    return {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}


def test_every_object_lies_in_the_namespace() -> None:
    namespace = of_kind("Namespace")["metadata"]["name"]
    for document in installed():
        if document["kind"] not in {"CSIDriver", "Namespace"}:
            assert document["metadata"]["namespace"] == namespace


def test_the_driver_has_one_name_everywhere(pod: Manifest) -> None:
    assert of_kind("CSIDriver")["metadata"]["name"] == DRIVER_NAME
    texts = [path.read_text() for path in [*EXAMPLES.rglob("*.yaml"), ROOT / "docs/kubernetes.md"]]
    assert {name for text in texts for name in re.findall(r"driver: (\S+)", text)} == {DRIVER_NAME}
    assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", DRIVER_NAME)
    named = re.findall(r"plugins/([\w.-]+)", (KUBERNETES / "trimsfs.yaml").read_text())
    assert set(named) == {DRIVER_NAME}


def test_the_csidriver_object_says_what_the_driver_relies_on() -> None:
    assert of_kind("CSIDriver")["spec"] == {
        "attachRequired": False,
        "fsGroupPolicy": "None",
        "podInfoOnMount": True,
        "requiresRepublish": True,
        "storageCapacity": False,
        "tokenRequests": [{"audience": AUDIENCE, "expirationSeconds": 3600}],
        "volumeLifecycleModes": ["Persistent", "Ephemeral"],
    }


@pytest.mark.parametrize("name", DAEMONSETS)
def test_all_that_containers_mount_is_declared_and_all_that_is_declared_is_mounted(name: str) -> None:
    pod = pod_of(name)
    declared = {volume["name"]: volume for volume in pod["volumes"]}
    used = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
    assert used == declared.keys()
    if "config" in declared:
        assert declared["config"]["configMap"]["name"] == of_kind("ConfigMap")["metadata"]["name"]
    assert of_kind("ServiceAccount", pod["serviceAccountName"])["automountServiceAccountToken"] is False
    labels = of_kind("DaemonSet", name)["spec"]["template"]["metadata"]["labels"]
    assert of_kind("DaemonSet", name)["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_both_pods_mount_the_same_directories_of_the_host_at_the_same_paths(keeper: Manifest, pod: Manifest) -> None:
    shared = paths(keeper).keys() & paths(pod).keys()
    assert {"mounts", "run"} == shared  # names of sockets come from the mount point, so it must be the same
    for name in shared:
        assert paths(keeper)[name] == paths(pod)[name]
    for each in (container(keeper, "keeper"), container(pod, "server"), container(pod, "csi")):
        places = {mount["name"]: mount["mountPath"] for mount in each["volumeMounts"]}
        assert {places[name] for name in shared} == {paths(pod)[name] for name in shared}


def test_mounts_propagate_from_the_keeper_to_server_and_driver_and_from_it_to_kubelet(
    keeper: Manifest, pod: Manifest
) -> None:
    def propagation(each: Manifest) -> dict[str, tuple[str, str | None]]:
        return {mount["name"]: (mount["mountPath"], mount.get("mountPropagation")) for mount in each["volumeMounts"]}

    mounts = paths(pod)["mounts"]
    assert propagation(container(keeper, "keeper"))["mounts"] == (mounts, "Bidirectional")
    assert propagation(container(pod, "server"))["mounts"] == (mounts, "HostToContainer")
    assert propagation(container(pod, "csi"))["mounts"] == (mounts, "HostToContainer")
    # The same path as on the host: the kubelet names targets by it.
    assert propagation(container(pod, "csi"))["pods"] == (paths(pod)["pods"], "Bidirectional")
    for each in [*keeper["containers"], *pod["containers"]]:
        both = [mount for mount in each["volumeMounts"] if mount.get("mountPropagation") == "Bidirectional"]
        privileged = each.get("securityContext", {}).get("privileged", False)
        assert bool(both) == privileged, each["name"]  # the one takes the other, and nothing else has it


def test_keeper_server_and_probes_are_about_one_mount(keeper: Manifest, pod: Manifest) -> None:
    holder, server = container(keeper, "keeper"), container(pod, "server")
    assert holder["command"] == ["mountctl", "keeper", MOUNTPOINT]
    assert server["command"] == ["trimsfs", "serve", MOUNTPOINT]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert holder[probe]["exec"]["command"] == ["mountctl", "keeper", "--check", MOUNTPOINT]
        assert MOUNTPOINT in " ".join(server[probe]["exec"]["command"])
    assert server["readinessProbe"]["exec"]["command"] == ["trimsfs", "status", MOUNTPOINT]
    for probe in ("startupProbe", "livenessProbe"):
        *shell, script = server[probe]["exec"]["command"]
        assert (shell, script) == (["/bin/sh", "-c"], f"trimsfs status {MOUNTPOINT}; test $? -lt 2")


def test_a_container_is_ready_within_seconds_of_what_makes_it_so(keeper: Manifest, pod: Manifest) -> None:
    """A kubelet that starts again, and a first probe that fails, cost a whole period."""
    text = (ROOT / "docs/kubernetes.md").read_text()
    for each in (container(keeper, "keeper"), container(pod, "server")):
        told = f"Readiness is probed every {each['readinessProbe']['periodSeconds']} s"
        assert each["readinessProbe"]["periodSeconds"] <= 10
        assert f"{told}, liveness once a minute" in text


def test_an_upgrade_replaces_servers_and_leaves_keepers(keeper: Manifest) -> None:
    strategies = {name: of_kind("DaemonSet", name)["spec"]["updateStrategy"]["type"] for name in DAEMONSETS}
    assert strategies == {"trimsfs": "RollingUpdate", "trimsfs-keeper": "OnDelete"}
    assert keeper["terminationGracePeriodSeconds"] >= 30  # it waits up to 25 s for a server to leave the mount to


def test_the_unit_of_systemd_has_the_capabilities_of_the_server_s_container(pod: Manifest) -> None:
    unit = (ROOT / "packaging/systemd/trimsfs-server@.service").read_text()
    (told,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    added = container(pod, "server")["securityContext"]["capabilities"]["add"]
    assert {name.removeprefix("CAP_") for name in told.split()} == {*added, "DAC_OVERRIDE"} - {"SYS_RESOURCE"}


def test_the_command_of_the_driver_is_one_that_it_understands(pod: Manifest) -> None:
    found = container(pod, "csi")
    program, command, *rest = found["command"]
    assert (program, command, rest) == ("mountctl", csi.name, [])
    parameters = csi.make_context("csi", list(found["args"])).params
    assert parameters["node_id"] == "$(NODE_NAME)"
    assert [variable["name"] for variable in found["env"]] == ["NODE_NAME"]
    assert str(parameters["mounts_dir"]) == str(Path(MOUNTPOINT).parent)
    files = of_kind("ConfigMap")["data"]
    (config,) = [mount for mount in found["volumeMounts"] if mount["name"] == "config"]
    assert str(parameters["tenants"]) in {f"{config['mountPath']}/{name}" for name in files}


def test_the_sidecars_are_told_the_driver_s_socket(pod: Manifest) -> None:
    socket = Path(options(container(pod, "csi")["args"])["endpoint"].removeprefix("unix://"))
    for name in ("csi", "node-driver-registrar", "liveness-probe"):
        found = container(pod, name)
        (mount,) = [mount for mount in found["volumeMounts"] if mount["name"] == "socket"]
        assert Path(mount["mountPath"]) == socket.parent, name
        if name != "csi":
            assert options(found["args"])["csi-address"] == str(socket)
    registration = options(container(pod, "node-driver-registrar")["args"])["kubelet-registration-path"]
    assert registration == f"{paths(pod)['socket']}/{socket.name}"
    assert len(registration) <= 107
    (port,) = container(pod, "csi")["ports"]
    assert options(container(pod, "liveness-probe")["args"])["health-port"] == str(port["containerPort"])
    assert container(pod, "csi")["readinessProbe"]["httpGet"]["port"] == port["name"]


def write_configuration(directory: Path, document: Manifest) -> None:
    """Write the files of a ConfigMap."""
    for name, text in document["data"].items():
        (directory / name).write_text(text)
        tomllib.loads(text)


def test_the_configuration_is_valid(tmp_path: Path, pod: Manifest) -> None:
    write_configuration(tmp_path, of_kind("ConfigMap"))
    mount = load_options({}, configs=[tmp_path / "config.toml"], environment={})
    assert mount.store == "s3://my-models"
    (cache,) = [volume for volume in pod["volumes"] if volume["name"] == "cache"]
    assert str(mount.cache_dir).startswith(cache["hostPath"]["path"])
    check_tenant(tmp_path / "tenants.toml", "any", "models", "")
