"""The examples ask for what the driver and the server give, and agree with each other."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mountctl.extras.csi import DRIVER_NAME
from mountctl.extras.csi.csi_requests import publication
from mountctl.extras.csi.status_errors import StatusError
from mountctl.extras.csi.tenants import check_tenant
from tests.csi.driver import needs_root, persistent
from tests.csi.driver import publication as inline
from tests.kubernetes.manifests import Manifest, check_claim, examples, of_kind
from tests.support.mounts import TRIMSFS, mounted
from trimsfs.options import MountOptions, load_options

MOUNTS = Path("/var/lib/trimsfs/mounts")
TARGET = "/var/lib/kubelet/pods/p/mount"


def configuration(directory: Path, document: Manifest) -> MountOptions:
    """Write the files of a ConfigMap; the mount's options."""
    for name, text in document["data"].items():
        (directory / name).write_text(text)
    return load_options({}, configs=[directory / "config.toml"], environment={})


def one(name: str, kind: str) -> Manifest:
    """The first document of a kind in an example."""
    return next(each for each in examples()[name] if each["kind"] == kind)


def csi_sources() -> list[Any]:
    """The CSI volumes of all examples, wherever they stand in a document."""

    def below(value: Any) -> list[Manifest]:
        if isinstance(value, dict):
            own = [value["csi"]] if isinstance(value.get("csi"), dict) else []
            return own + [each for inner in value.values() for each in below(inner)]
        return [each for inner in value for each in below(inner)] if isinstance(value, list) else []

    found = [(name, source) for name, documents in examples().items() for source in below(list(documents))]
    return [pytest.param(source, id=f"{name}-{number}") for number, (name, source) in enumerate(found)]


@pytest.mark.parametrize("source", csi_sources())
def test_each_volume_is_one_that_the_driver_takes(source: Manifest) -> None:
    assert source["driver"] == DRIVER_NAME
    assert source["readOnly"] is True
    attributes = source.get("volumeAttributes", {})
    if "volumeHandle" in source:
        wanted = publication(persistent(TARGET, source["volumeHandle"], attributes), MOUNTS)
    else:
        wanted = publication(inline(TARGET, "csi-1", attributes), MOUNTS)
    assert wanted.mount in {None, "models"}
    assert wanted.path == attributes.get("path", "")


def test_volume_and_claim_belong_together_and_kserve_names_the_claim() -> None:
    volume, claim = one("volume.yaml", "PersistentVolume"), one("volume.yaml", "PersistentVolumeClaim")
    check_claim(volume, claim)
    service = one("kserve.yaml", "InferenceService")
    assert service["metadata"]["namespace"] == claim["metadata"]["namespace"]
    assert service["spec"]["predictor"]["model"]["storageUri"].startswith(f"pvc://{claim['metadata']['name']}/")


def link(directory: Path, uri: str) -> "subprocess.CompletedProcess[str]":
    """Run the storage container for a URI as KServe does, with the volume in another directory."""
    container = one("kserve-storage-container.yaml", "ClusterStorageContainer")["spec"]["container"]
    command = [word.replace("/models", str(directory / "models")) for word in container["command"]]
    target = directory / "target"
    target.mkdir()
    return subprocess.run([*command, uri, target], capture_output=True, text=True, timeout=60, check=False)


def test_kserve_s_storage_container_links_all_of_a_model_and_copies_nothing(tmp_path: Path) -> None:
    model = tmp_path / "models/a model/prod"
    (model / "tokenizer").mkdir(parents=True)
    (model / "tokenizer/vocab").write_text("words")
    for name in ("weights", ".hidden", "two words", "-n"):
        (model / name).write_text(name)

    done = link(tmp_path, "trimsfs://a model/prod")

    assert (done.returncode, done.stderr) == (0, "")
    target = tmp_path / "target"
    assert {path.name for path in target.iterdir()} == {"weights", ".hidden", "two words", "-n", "tokenizer"}
    assert all(path.is_symlink() and path.resolve() == model / path.name for path in target.iterdir())
    assert (target / "tokenizer/vocab").read_text() == "words"


def test_kserve_s_storage_container_names_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    done = link(tmp_path, "trimsfs://missing")
    assert (done.returncode, done.stderr) == (1, "trimsfs://missing: is no directory of the mount\n")


def test_the_pods_of_the_storage_container_have_its_volume_where_the_links_lead() -> None:
    container = one("kserve-storage-container.yaml", "ClusterStorageContainer")["spec"]["container"]
    predictor = one("kserve-storage-container.yaml", "InferenceService")["spec"]["predictor"]
    assert container["volumeMounts"] == predictor["model"]["volumeMounts"]
    assert [volume["name"] for volume in predictor["volumes"]] == [each["name"] for each in container["volumeMounts"]]


def test_tenants_of_the_example_have_a_role_by_the_token_of_their_service_account(tmp_path: Path) -> None:
    document = one("web-identity.yaml", "ConfigMap")
    assert document["metadata"] == of_kind("ConfigMap")["metadata"]  # it takes the other's place
    options = configuration(tmp_path, document)
    for tenant in options.tenants:
        assert str(tenant.web_identity_token_file) == f"/run/trimsfs/tokens/{tenant.path}/reader"
        check_tenant(tmp_path / "tenants.toml", tenant.path, "models", tenant.path)
        for other in {each.path for each in options.tenants} - {tenant.path}:
            with pytest.raises(StatusError, match="may not use"):
                check_tenant(tmp_path / "tenants.toml", tenant.path, "models", other)
    pod, account = one("web-identity.yaml", "Pod"), one("web-identity.yaml", "ServiceAccount")
    assert (pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]) == ("vision", "reader")
    assert account["metadata"] == {"name": "reader", "namespace": "vision"}


@needs_root
def test_the_job_may_warm_as_its_group_and_nobody_else_may(tmp_path: Path) -> None:
    (tmp_path / "store/llama").mkdir(parents=True)
    (tmp_path / "store/llama/weights").write_bytes(b"weights")
    options = configuration(tmp_path, of_kind("ConfigMap"))
    spec = one("warm", "Job")["spec"]["template"]["spec"]
    context, command = spec["securityContext"], spec["containers"][0]["command"]
    assert (command[0], command[1]) == ("trimsfs", "warm")

    with mounted(tmp_path / "store", tmp_path, "--control-gid", str(options.control_gid)) as mount:

        def warm(group: int) -> "subprocess.CompletedProcess[str]":
            ids = [f"--reuid={context['runAsUser']}", f"--regid={group}", "--clear-groups", "--bounding-set=-all"]
            words = [TRIMSFS, *command[1:-1], str(mount.path / "llama")]
            run = ["setpriv", *ids, "--no-new-privs", *words]
            return subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)

        assert warm(65534).returncode == 11
        done = warm(context["runAsGroup"])
        assert done.returncode == 0, done.stderr
        assert mount.info("llama/weights")["residency"]["disk"] == 7
