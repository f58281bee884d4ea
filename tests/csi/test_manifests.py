"""The manifests agree with each other and with the code. What a cluster would say of them is not tested."""

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from mountctl.csi import DRIVER_NAME
from mountctl.csi.command import csi
from mountctl.csi.requests import publication
from mountctl.csi.tenants import check_tenant
from tests.csi.driver import is_dead, kill_together, needs_root, persistent
from tests.csi.driver import publication as request_of
from tests.services.web_identity import AUDIENCE
from tests.support.mounts import TRIMSFS, unmount, wait_until
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, mount_at
from trimsfs.options import load_options

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "packaging/kubernetes"
MOUNTPOINT = "/var/lib/trimsfs/mounts/models"

Manifest = dict[str, Any]


def manifests() -> dict[str, list[Manifest]]:
    return {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(KUBERNETES.glob("*.yaml"))}


def of_kind(kind: str) -> Manifest:
    (found,) = [document for documents in manifests().values() for document in documents if document["kind"] == kind]
    return found


@pytest.fixture
def pod() -> Manifest:
    """The pod that the DaemonSet makes on each node."""
    spec: Manifest = of_kind("DaemonSet")["spec"]["template"]["spec"]
    return spec


def container(pod: Manifest, name: str) -> Manifest:
    (found,) = [container for container in pod["containers"] if container["name"] == name]
    assert isinstance(found, dict)
    return found


def options(arguments: list[str]) -> dict[str, str]:
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


def test_the_kustomization_has_all_but_the_example() -> None:
    kustomization = of_kind("Kustomization")
    assert {*kustomization["resources"], "kustomization.yaml", "example-pod.yaml"} == set(manifests())
    (image,) = kustomization["images"]
    pod = of_kind("DaemonSet")["spec"]["template"]["spec"]
    assert f"{image['name']}:{image['newTag']}" in {each["image"] for each in pod["containers"]}


def test_every_manifest_is_complete_and_in_the_namespace() -> None:
    namespace = of_kind("Namespace")["metadata"]["name"]
    for name, documents in manifests().items():
        for document in documents:
            assert {"apiVersion", "kind"} <= document.keys()
            if document["kind"] in {"DaemonSet", "ServiceAccount", "ConfigMap"}:
                assert document["metadata"]["namespace"] == namespace, name


def test_the_driver_has_one_name_everywhere(pod: Manifest) -> None:
    (volume,) = of_kind("Pod")["spec"]["volumes"]
    assert DRIVER_NAME == of_kind("CSIDriver")["metadata"]["name"] == volume["csi"]["driver"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", DRIVER_NAME)
    named = re.findall(r"plugins/([\w.-]+)", (KUBERNETES / "daemonset.yaml").read_text())
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


def test_all_that_containers_mount_is_declared_and_all_that_is_declared_is_mounted(pod: Manifest) -> None:
    declared = {volume["name"]: volume for volume in pod["volumes"]}
    used = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
    assert used == declared.keys()
    assert declared["config"]["configMap"]["name"] == of_kind("ConfigMap")["metadata"]["name"]
    assert pod["serviceAccountName"] == of_kind("ServiceAccount")["metadata"]["name"]
    labels = of_kind("DaemonSet")["spec"]["template"]["metadata"]["labels"]
    assert of_kind("DaemonSet")["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_mounts_propagate_from_the_server_to_the_driver_and_from_it_to_kubelet(pod: Manifest) -> None:
    def propagation(name: str) -> dict[str, tuple[str, str | None]]:
        mounts = container(pod, name)["volumeMounts"]
        return {mount["name"]: (mount["mountPath"], mount.get("mountPropagation")) for mount in mounts}

    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert propagation("models")["mounts"] == (paths["mounts"], "Bidirectional")
    assert propagation("csi")["mounts"] == (paths["mounts"], "HostToContainer")
    assert propagation("csi")["pods"] == (paths["pods"], "Bidirectional")  # the same path: kubelet names targets by it
    for each in pod["containers"]:
        both = [mount for mount in each["volumeMounts"] if mount.get("mountPropagation") == "Bidirectional"]
        privileged = each.get("securityContext", {}).get("privileged", False)
        assert bool(both) == privileged, each["name"]  # the one takes the other, and nothing else has it


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
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    for name in ("csi", "node-driver-registrar", "liveness-probe"):
        found = container(pod, name)
        (mount,) = [mount for mount in found["volumeMounts"] if mount["name"] == "socket"]
        assert Path(mount["mountPath"]) == socket.parent, name
        if name != "csi":
            assert options(found["args"])["csi-address"] == str(socket)
    registration = options(container(pod, "node-driver-registrar")["args"])["kubelet-registration-path"]
    assert registration == f"{paths['socket']}/{socket.name}"
    assert len(registration) <= 107
    (port,) = container(pod, "csi")["ports"]
    assert options(container(pod, "liveness-probe")["args"])["health-port"] == str(port["containerPort"])
    assert container(pod, "csi")["readinessProbe"]["httpGet"]["port"] == port["name"]


def test_the_configuration_is_valid(tmp_path: Path, pod: Manifest) -> None:
    for name, text in of_kind("ConfigMap")["data"].items():
        (tmp_path / name).write_text(text)
        tomllib.loads(text)
    mount = load_options({}, configs=[tmp_path / "config.toml"], environment={})
    assert mount.store == "s3://my-models"
    (cache,) = [volume for volume in pod["volumes"] if volume["name"] == "cache"]
    assert str(mount.cache_dir).startswith(cache["hostPath"]["path"])
    check_tenant(tmp_path / "tenants.toml", "any", "models", "")


def test_the_example_asks_for_what_the_driver_gives() -> None:
    spec = of_kind("Pod")["spec"]
    (volume,) = spec["volumes"]
    request = request_of("/var/lib/kubelet/pods/p/mount", "csi-1", volume["csi"]["volumeAttributes"])
    wanted = publication(request, Path(MOUNTPOINT).parent)
    assert (wanted.mount, wanted.path) == (Path(MOUNTPOINT).name, "resnet50")
    for each in spec["containers"]:
        assert [mount["name"] for mount in each["volumeMounts"]] == [volume["name"]]


def test_the_documentation_shows_what_is_understood(tmp_path: Path) -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    blocks, tables = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("yaml", "toml"))
    documents = [each for block in blocks for each in yaml.safe_load_all(block)]
    (volume,) = (each for document in documents for each in document.get("volumes", ()) if "csi" in each)
    assert volume["csi"]["driver"] == DRIVER_NAME
    target = "/var/lib/kubelet/pods/p/mount"
    request = request_of(target, "csi-1", volume["csi"]["volumeAttributes"])
    assert publication(request, Path(MOUNTPOINT).parent).path == "resnet50"
    (tenants,) = (table for table in tables if "[[tenant]]" in table)
    (tmp_path / "tenants.toml").write_text(tenants)
    check_tenant(tmp_path / "tenants.toml", "vision-2", "models", "public/resnet50")


def test_the_documentation_shows_a_persistent_volume_and_a_claim_that_belong_together() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    documents = [each for block in blocks for each in yaml.safe_load_all(block)]
    volume, claim = (
        next(each for each in documents if each.get("kind") == kind)
        for kind in ("PersistentVolume", "PersistentVolumeClaim")
    )
    source = volume["spec"]["csi"]
    assert source["driver"] == DRIVER_NAME
    request = persistent("/var/lib/kubelet/pods/p/mount", source["volumeHandle"], source["volumeAttributes"])
    assert publication(request, Path(MOUNTPOINT).parent).path == "resnet50"
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"] == ""
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["resources"]["requests"]["storage"] == volume["spec"]["capacity"]["storage"]
    reference = volume["spec"]["claimRef"]
    assert reference == {key: claim["metadata"][key] for key in ("name", "namespace")}


def test_the_documentation_shows_a_tenant_with_the_role_of_a_service_account(tmp_path: Path) -> None:
    text = (ROOT / "docs/kubernetes.md").read_text()
    (table,) = (each for each in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[[tenants]]" in each)
    (tmp_path / "config.toml").write_text(table)
    (tenant,) = load_options({}, configs=[tmp_path / "config.toml"], environment={}).tenants
    assert str(tenant.web_identity_token_file) == "/run/trimsfs/tokens/team-a/reader"


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Where the start script, told of other directories, mounts."""
    path = tmp_path / "mounts/models"
    path.parent.mkdir()
    (tmp_path / "store").mkdir()
    yield path
    if mount_at(path) is not None:
        unmount(path)


@needs_root
def test_the_start_script_mounts_whatever_was_left_before_it(mountpoint: Path, pod: Manifest, tmp_path: Path) -> None:
    found = container(pod, "models")
    (script,) = found["args"]
    config = tmp_path / "config.toml"
    config.write_text(f'store = "{tmp_path}/store"\ncache_dir = "{tmp_path}/cache"\n')
    script = script.replace(MOUNTPOINT, str(mountpoint)).replace("/etc/trimsfs/config.toml", str(config))
    assert "/var" not in script
    environment = {**os.environ, "PATH": f"{Path(TRIMSFS).parent}:{os.environ['PATH']}"}

    for turn in range(3):  # no directory; a dead mount; a directory
        process = subprocess.Popen([*found["command"], script], env=environment, stderr=subprocess.DEVNULL)
        try:
            # Read, not only looked at: the kernel may know a file of a dead mount.
            wait_until(lambda: bool((mountpoint / ".trims/control").read_text()), tolerate=OSError)
            mounted = mount_at(mountpoint)
            assert mounted is not None
            assert mounted.kind == FILE_SYSTEM_TYPE
            if turn == 0:
                kill_together(process.pid)
                process.wait(timeout=20)
                wait_until(lambda: is_dead(mountpoint))
                assert mount_at(mountpoint) is not None
            else:
                process.terminate()
                assert process.wait(timeout=20) == 0
                assert mount_at(mountpoint) is None
        finally:
            process.kill()
            process.wait(timeout=20)


def test_the_probe_of_the_mount_asks_what_the_script_mounts(pod: Manifest) -> None:
    found = container(pod, "models")
    (script,) = found["args"]
    commands = [shlex.split(line, comments=True) for line in script.splitlines()]
    assert next(line for line in commands if line[:3] == ["exec", "trimsfs", "mount"])[3] == MOUNTPOINT
    assert found["livenessProbe"]["exec"]["command"] == ["stat", "-f", MOUNTPOINT]


def test_the_image_is_made_of_what_make_builds() -> None:
    text = (ROOT / "packaging/Dockerfile").read_text()
    (sources,) = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    assert sources == ["build/wheelhouse"]
    assert "-d build/wheelhouse" in (ROOT / "Makefile").read_text()
    assert (ROOT / ".dockerignore").read_text().split() == ["*", "!build/wheelhouse"]


def test_the_command_of_csi_is_known_to_mountctl() -> None:
    from mountctl.commands.main import main

    assert main.get_command(click.Context(main), "csi") is csi
