"""The component that makes the nodes a fleet: what it adds, and that its parts agree."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from mountctl.commands.declared_mounts import declared_mounts
from mountctl.extras.fleet.nginx import Member, render
from tests.kubernetes.manifests import NEWEST, OLDEST, ROOT, Manifest, container, of_kind, one, with_fleet
from trimsfs.options import load_options
from trimsfs.options.schema import FALLBACK_UID

PAGE = (ROOT / "docs/kubernetes.md").read_text().partition("\n## Fleet\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, ...]:
    """What the page's commands apply."""
    return with_fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def pod(documents: tuple[Manifest, ...]) -> Manifest:
    spec: Manifest = one(documents, "DaemonSet", "trimsfs")["spec"]["template"]["spec"]
    return spec


def test_all_of_it_is_valid(documents: tuple[Manifest, ...]) -> None:
    for document in documents:
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(document, version, strict=True)


def test_nginx_runs_beside_the_server_from_the_same_image(pod: Manifest) -> None:
    nginx, server = container(pod, "nginx"), container(pod, "server")
    assert nginx["image"] == server["image"]
    assert "@sha256:" in nginx["image"]
    assert nginx["command"] == ["mountctl", "fleet", "run"]
    assert [each["name"] for each in pod["containers"]].count("nginx") == 1
    assert {"cpu", "memory"} <= nginx["resources"]["requests"].keys()
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for each in (nginx, server) for mount in each["volumeMounts"]} <= volumes


def test_nginx_may_read_the_cache_and_the_key_and_has_no_privilege(pod: Manifest) -> None:
    security = container(pod, "nginx")["securityContext"]
    assert security["runAsGroup"] == pod["securityContext"]["fsGroup"] == FALLBACK_UID
    assert security["runAsUser"] not in {0, FALLBACK_UID}
    assert (security["allowPrivilegeEscalation"], security["capabilities"]) == (False, {"drop": ["ALL"]})
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert secret["defaultMode"] == 0o440


def test_server_and_nginx_have_one_configuration_which_is_valid(
    documents: tuple[Manifest, ...], pod: Manifest, tmp_path: Path
) -> None:
    nginx, server = container(pod, "nginx"), container(pod, "server")
    assert nginx["env"] == server["env"]
    environment = {each["name"]: each["value"] for each in nginx["env"]}
    (tmp_path / "config.toml").write_text(of_kind("ConfigMap")["data"]["config.toml"])
    options = load_options({}, configs=[tmp_path / "config.toml"], environment=environment)
    (mounts,) = re.findall(r"--mounts-dir=(\S+)", " ".join(nginx["args"]))
    paths = {mount["name"]: mount["mountPath"] for mount in nginx["volumeMounts"]}
    assert mounts == paths["fleet-mounts"]
    assert options.cache_dir is not None
    assert str(options.cache_dir).startswith(paths["cache"])
    for path in (options.fleet_ca, options.fleet_cert, options.fleet_key):
        assert path is not None
        assert str(path.parent) == paths["fleet-certificates"]
    (tmp_path / "mounts").mkdir()
    for name, text in one(documents, "ConfigMap", "trimsfs-fleet")["data"].items():
        (tmp_path / "mounts" / name).write_text(text)
    ((mount,), problems) = declared_mounts(tmp_path / "mounts")
    assert problems == []
    assert str(mount.mountpoint) in server["command"]
    text = render(Path(paths["fleet-state"]), [Member(mountpoint=mount.mountpoint, options=options)])
    assert f"listen 0.0.0.0:{nginx['ports'][0]['containerPort']} ssl backlog=" in text


def test_the_servers_find_each_other_by_the_service(documents: tuple[Manifest, ...], pod: Manifest) -> None:
    service = one(documents, "Service", "trimsfs-fleet")
    labels = one(documents, "DaemonSet", "trimsfs")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= labels.items()
    environment = {each["name"]: each["value"] for each in container(pod, "server")["env"]}
    (port,) = service["spec"]["ports"]
    metadata = service["metadata"]
    assert environment["TRIMSFS_FLEET_MEMBERS"] == f"{metadata['name']}.{metadata['namespace']}.svc:{port['port']}"
    assert environment["TRIMSFS_FLEET_LISTEN"].endswith(f":{port['port']}")
    policy = one(documents, "NetworkPolicy", "trimsfs-fleet")["spec"]
    assert policy["podSelector"]["matchLabels"] == service["spec"]["selector"]
    assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}], "ports": [{"port": port["port"]}]}]


def test_cert_manager_makes_the_secret_that_the_pods_take(pod: Manifest) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    own, authority, issuer, member = yaml.safe_load_all(block)
    assert {each["metadata"]["namespace"] for each in (own, authority, issuer, member)} == {"trimsfs"}
    assert authority["spec"]["issuerRef"]["name"] == own["metadata"]["name"]
    assert authority["spec"]["isCA"]
    assert issuer["spec"]["ca"]["secretName"] == authority["spec"]["secretName"]
    assert member["spec"]["issuerRef"]["name"] == issuer["metadata"]["name"]
    assert member["spec"]["usages"] == ["server auth", "client auth"]
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert member["spec"]["secretName"] == secret["secretName"]
