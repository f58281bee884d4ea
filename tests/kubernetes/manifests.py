"""The manifests as kubectl applies them: those of the directory, and the examples."""

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "packaging/kubernetes"
EXAMPLES = KUBERNETES / "example"
KUBECTL = str(Path(sys.executable).with_name("kubectl"))

OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
"""The versions of Kubernetes that the manifests are checked for."""

Manifest = dict[str, Any]


@functools.cache
def resolved(directory: Path) -> tuple[Manifest, ...]:
    """What `kubectl apply -k DIRECTORY` applies, as kubectl's own kustomize resolves it."""
    done = subprocess.run([KUBECTL, "kustomize", directory], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def installed() -> tuple[Manifest, ...]:
    """What `kubectl apply -k packaging/kubernetes` applies."""
    return resolved(KUBERNETES)


def with_fleet(directory: Path) -> tuple[Manifest, ...]:
    """What the commands of docs/kubernetes.md apply that make the nodes a fleet, run in an empty directory."""
    page = (ROOT / "docs/kubernetes.md").read_text().partition("\n## Fleet\n")[2].partition("\n## ")[0]
    shutil.copytree(KUBERNETES, directory / "packaging/kubernetes")
    (command,) = re.findall(r"^sed .*$", page, re.MULTILINE)
    for _ in range(2):
        subprocess.run(["sh", "-ec", command], cwd=directory, check=True, timeout=60)
    assert (directory / "packaging/kubernetes/kustomization.yaml").read_text().count("example/fleet") == 1
    return resolved(directory / "packaging/kubernetes")


def one(documents: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    """The one document of a kind and a name."""
    (found,) = [each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


@functools.cache
def examples() -> dict[str, tuple[Manifest, ...]]:
    """The documents of each example by its path: a file, or a directory with a kustomization."""
    found = {path.parent: resolved(path.parent) for path in sorted(EXAMPLES.glob("*/kustomization.yaml"))}
    files = sorted(EXAMPLES.glob("*.yaml"))
    found |= {path: tuple(yaml.safe_load_all(path.read_text())) for path in files}
    return {str(path.relative_to(EXAMPLES)): documents for path, documents in found.items()}


def every_document() -> list[tuple[str, Manifest]]:
    """All documents with their names: KIND/NAME, and the example that has it."""
    all_of = {"": installed()} | examples()
    return [
        (f"{where}:{each['kind']}/{each['metadata']['name']}", each)
        for where, documents in all_of.items()
        for each in documents
    ]


def pod_specs() -> Iterator[tuple[str, Manifest]]:
    """The specs of all pods that Kubernetes itself makes of them, with the names of their documents."""
    for name, document in every_document():
        spec = document.get("spec", {})
        if document["kind"] == "Pod":
            yield name, spec
        elif "template" in spec:
            yield name, spec["template"]["spec"]


def of_kind(kind: str, name: str | None = None) -> Manifest:
    """The one installed document of a kind, or of a kind and a name."""
    (found,) = [
        each for each in installed() if each["kind"] == kind and (name is None or each["metadata"]["name"] == name)
    ]
    return found


def pod_of(daemonset: str) -> Manifest:
    """The pod that an installed DaemonSet makes on each node."""
    spec: Manifest = of_kind("DaemonSet", daemonset)["spec"]["template"]["spec"]
    return spec


def check_claim(volume: Manifest, claim: Manifest) -> None:
    """Fail unless a PersistentVolume and its claim belong together, for readers."""
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"] == ""
    assert volume["spec"]["claimRef"] == {key: claim["metadata"][key] for key in ("name", "namespace")}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["resources"]["requests"] == volume["spec"]["capacity"]


def container(pod: Manifest, name: str) -> Manifest:
    """A container of a pod by its name."""
    (found,) = [each for each in pod["containers"] if each["name"] == name]
    assert isinstance(found, dict)
    return found
