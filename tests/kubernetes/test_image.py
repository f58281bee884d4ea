"""The image of the manifests: what goes into its build, and how its digest comes into them."""

import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3
import yaml

import trimsfs
from tests.containers.engines import Podman, run
from tests.csi.driver import needs_root
from tests.kubernetes.manifests import KUBERNETES, ROOT, resolved
from tests.services.registry import Registry

pytestmark = needs_root

OCI = "application/vnd.oci.image.manifest.v1+json"
WORKED_IN = (
    ".git/config",
    ".venv/lib/python3.11/site-packages/trio/__init__.py",
    ".mypy_cache/cache.json",
    "build/lib.linux-x86_64-cpython-311/trimsfs/fuse/_libfuse.so",
    "build/wheels/cp313/trimsfs.whl",
    "dist/trimsfs.tar",
    "secret.key",
    "trimsfs/fuse/_libfuse.cpython-311-x86_64-linux-gnu.so",
    "trimsfs/__pycache__/types.cpython-311.pyc",
)
"""Files that a clone has after some work in it, and git does not track."""


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman with storage of its own."""
    engine = Podman(tmp_path_factory.mktemp("podman"))
    engine.configure()
    yield engine
    shutil.rmtree(engine.directory, ignore_errors=True)


def test_of_a_clone_only_wheels_go_into_the_build(podman: Podman, tmp_path: Path) -> None:
    clone, out = tmp_path / "clone", tmp_path / "out"
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    wheels = {"build/wheelhouse/trimsfs.whl", "build/wheelhouse/trio.whl"}
    for name in (*done.stdout.splitlines(), *WORKED_IN, *wheels):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("any")
    shutil.copy(ROOT / ".dockerignore", clone)
    everything = tmp_path / "Containerfile"
    everything.write_text("FROM scratch\nCOPY . /\n")

    limits = [f"--ulimit={name}=1024:1024" for name in ("nofile", "nproc")]  # podman's own may be above those here
    built = podman("build", *limits, "--isolation=chroot", f"--output={out}", "-f", everything, clone)

    assert built.returncode == 0, built.stderr
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == wheels


def test_the_build_needs_nothing_else_of_its_context() -> None:
    text = (ROOT / "packaging/Dockerfile").read_text()
    copied = [line for line in text.splitlines() if line.startswith(("COPY ", "ADD ")) and "--from" not in line]
    sources = [line.split()[1:-1] for line in copied]
    assert sources == [["build/wheelhouse"]]
    assert "-d build/wheelhouse" in (ROOT / "Makefile").read_text()


def test_a_push_writes_the_digest_that_the_registry_serves_into_all_manifests(
    podman: Podman, registry: Registry, tmp_path: Path
) -> None:
    shutil.copytree(KUBERNETES.parent, tmp_path / "packaging")
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        tar.add(ROOT / "README.md", "README.md")
    done = podman("import", tmp_path / "root.tar", f"localhost/trimsfs:{trimsfs.__version__}")
    assert done.returncode == 0, done.stderr
    image = f"{registry.address}/platform/trimsfs"
    options = podman.environment | {"PUSH_OPTIONS": "--tls-verify=false"}

    done = run(tmp_path / "packaging/push.sh", image, trimsfs.__version__, environment=options)

    assert done.returncode == 0, done.stderr
    url = f"http://{registry.address}/v2/platform/trimsfs/manifests/{trimsfs.__version__}"
    digest = urllib3.request("HEAD", url, headers={"Accept": OCI}).headers["docker-content-digest"]
    assert done.stdout.strip() == f"{image}:{trimsfs.__version__}@{digest}"
    images = yaml.safe_load((tmp_path / "packaging/kubernetes/image/kustomization.yaml").read_text())["images"]
    assert images == [{"name": "trimsfs", "newName": image, "digest": digest}]
    pushed = tmp_path / "packaging/kubernetes"
    for directory in (pushed, pushed / "example/warm", pushed / "example/node-labels"):
        text = yaml.safe_dump_all(resolved(directory))
        assert set(re.findall(r"image: (\S*trimsfs\S*)", text)) == {f"{image}@{digest}"}
