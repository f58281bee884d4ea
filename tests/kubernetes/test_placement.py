"""Placement: the labels of a node that has models on disk, by a real mount; the API server is a stand-in."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.csi.driver import needs_root
from tests.kubernetes.api_server import ApiServer, api_server, merged
from tests.kubernetes.manifests import EXAMPLES, Manifest, container, examples
from tests.support.mounts import TRIMSFS, MountedStore, mounted, trimsfs, wait_until
from trimsfs.cli.control_client import mount_over
from trimsfs.cli.ls import Below, rows_below
from trimsfs.errors import NoSuchEntryError, NotPermittedError, StoreAccessError, TrimsError
from trimsfs.extras.kubernetes import node_labels
from trimsfs.extras.kubernetes.node import label_key
from trimsfs.extras.kubernetes.node_labels import PREFIX

pytestmark = needs_root

MIB = 1 << 20
IN_A_POD = """
mount -t tmpfs none /run
mkdir -p /run/secrets/kubernetes.io
cp -r "$ACCOUNT" /run/secrets/kubernetes.io/serviceaccount
exec setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set=-all --no-new-privs "$@"
"""


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount with three models, of which one is here whole, one by a third, and one not at all."""
    directory = tmp_path_factory.mktemp("placement")
    store = directory / "store"
    for name, size in {"llama/a": 2, "llama/b": 1, "meta/bert-großes Modell/a": 1, "cold/a": 1, "part/a": 1}.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(os.urandom(size * MIB))
    (store / "part/b").write_bytes(os.urandom(2 * MIB))
    (store / "single.gguf").write_bytes(os.urandom(MIB))
    with mounted(store, directory, "--prefetch", "off", "--metadata-ttl", "0.2") as found:
        done = trimsfs("warm", *(found.path / name for name in ("llama", "meta", "part/a", "single.gguf")))
        assert done.returncode == 0, done.stderr
        yield found


def printed(*arguments: str | Path, timeout_s: float = 60) -> dict[str, str]:
    """The labels that the command prints."""
    done = trimsfs("node-labels", *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=") for line in done.stdout.splitlines())


def test_labels_tell_the_share_of_each_model_on_disk(mount: MountedStore) -> None:
    assert printed(mount.path) == {
        f"{PREFIX}/llama": "100",
        f"{PREFIX}/meta": "100",
        f"{PREFIX}/part": "30",
        f"{PREFIX}/single.gguf": "100",
    }


def test_models_of_more_directories_have_keys_that_the_command_tells(mount: MountedStore) -> None:
    found = printed(mount.path, "--depth", "2")
    key = trimsfs("node-labels", "--key", "meta/bert-großes Modell").stdout.strip()
    assert key == label_key(PREFIX, "meta/bert-großes Modell")
    assert found[key] == "100"


@pytest.mark.parametrize("error", [NoSuchEntryError, NotPermittedError, StoreAccessError])
def test_a_model_that_cannot_be_listed_has_no_label_and_the_others_have(
    mount: MountedStore, monkeypatch: pytest.MonkeyPatch, error: type[TrimsError]
) -> None:
    """As one whose tenant's credentials have ended."""

    def rows(path: Path, lines: str | None) -> Below:
        if path.name == "llama":
            raise error("not now")
        return rows_below(path, lines)

    monkeypatch.setattr(node_labels, "rows_below", rows)
    found = node_labels._shares_of(mount_over(mount.path), depth=1, limit=9)
    assert {name: int(share * 100) for name, share in found.items()} == {"meta": 100, "part": 33, "single.gguf": 100}


def test_the_number_of_labels_is_bounded_and_the_largest_models_have_them(mount: MountedStore) -> None:
    assert printed(mount.path, "--limit", "1") == {f"{PREFIX}/llama": "100"}
    assert printed(mount.path, "--limit", "0") == {}
    assert trimsfs("node-labels", mount.path, "--limit", "257").returncode == 2


def test_a_patch_of_a_node_removes_what_is_not_here_any_more(mount: MountedStore) -> None:
    labels = {f"{PREFIX}/gone": "100", f"{PREFIX}/part": "30", f"{PREFIX}/llama": "50", "zone": "a"}
    node = {"metadata": {"name": "n", "labels": labels}}
    command = [TRIMSFS, "node-labels", "--patch", "--limit", "2", str(mount.path)]
    done = subprocess.run(command, input=json.dumps(node), capture_output=True, text=True, timeout=60, check=True)
    wanted = printed(mount.path, "--limit", "2")
    assert merged(node, json.loads(done.stdout))["metadata"]["labels"] == wanted | {"zone": "a"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"metadata": 3}'])
def test_a_patch_of_what_is_no_node_is_refused(mount: MountedStore, text: str) -> None:
    command = [TRIMSFS, "node-labels", "--patch", str(mount.path)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is no node" in done.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ApiServer]:
    """An API server whose node has a label of an earlier run, and one of others."""
    with api_server(tmp_path, "node-1", {"zone": "a", f"{PREFIX}/gone": "100"}) as server:
        yield server


def in_a_pod(cluster: ApiServer, *command: str | Path) -> "subprocess.Popen[str]":
    """Run the command as the manifest does: an unprivileged user, with the account's files where a pod has them."""
    return subprocess.Popen(
        ["unshare", "-m", "--propagation", "slave", "sh", "-euc", IN_A_POD, "-", *command],
        env={**os.environ, **cluster.environment, "ACCOUNT": str(cluster.account), "NODE_NAME": "node-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def labelled(cluster: ApiServer, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run the command once in a pod."""
    with in_a_pod(cluster, TRIMSFS, "node-labels", *arguments) as process:
        out, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, errors)


def sidecar() -> Manifest:
    """The container of the example."""
    (daemonset,) = [each for each in examples()["node-labels"] if each["kind"] == "DaemonSet"]
    return container(daemonset["spec"]["template"]["spec"], "node-labels")


def test_the_sidecar_labels_its_node_again_and_again(cluster: ApiServer, mount: MountedStore) -> None:
    found = sidecar()
    words = [word.replace("$(NODE_NAME)", "node-1") for word in found["command"] + found["args"]]
    assert words[0] == "trimsfs"
    words = [word.replace("/var/lib/trimsfs/mounts/models", str(mount.path)) for word in words]
    words = [word.replace("--every=300", "--every=1") for word in words]
    expected = printed(mount.path)
    with in_a_pod(cluster, TRIMSFS, *words[1:]) as process:
        try:
            wait_until(lambda: cluster.labels == expected | {"zone": "a"} and len(cluster.patches) > 0)
            assert len(cluster.patches) == 1
            cluster.refuses = 503
            assert process.stderr is not None
            assert process.stderr.readline() == (
                "trimsfs: node node-1: GET: the API server answers 503: trying again in 1 s\n"
            )
            cluster.refuses = 0
            cluster.node["metadata"]["labels"][f"{PREFIX}/gone"] = "100"
            wait_until(lambda: len(cluster.patches) == 2)
            assert cluster.labels == expected | {"zone": "a"}
            assert cluster.patches[-1] == {"metadata": {"labels": {f"{PREFIX}/gone": None}}}
        finally:
            process.terminate()


def test_a_node_without_the_mount_has_no_labels_of_it(cluster: ApiServer, tmp_path: Path) -> None:
    done = labelled(cluster, "--node", "node-1", tmp_path)
    assert (done.returncode, cluster.labels) == (0, {"zone": "a"})
    assert "is not on a trimsfs mount" in done.stderr


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, 11, "the service account must have get and patch of nodes"),
        (404, 13, "does not exist: give --node spec.nodeName"),
        (500, 7, "the API server answers 500"),
    ],
)
def test_an_api_server_that_refuses_is_one_line_and_an_exit_code(
    cluster: ApiServer, mount: MountedStore, status: int, code: int, words: str
) -> None:
    cluster.refuses = status
    done = labelled(cluster, "--node", "node-1", mount.path)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert words in done.stderr


def test_outside_of_a_pod_nothing_is_labelled(mount: MountedStore) -> None:
    done = trimsfs("node-labels", "--node", "node-1", mount.path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "needs a pod with a service account" in done.stderr


def test_the_role_of_the_sidecar_is_to_get_and_patch_nodes() -> None:
    (role,) = [each for each in examples()["node-labels"] if each["kind"] == "ClusterRole"]
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}]
    text = (EXAMPLES / "node-labels/rbac.yaml").read_text()
    assert text.count(f"{PREFIX}/") == 2  # the policy knows the prefix


def test_the_example_of_a_pod_prefers_the_label_of_its_model() -> None:
    (deployment,) = [each for each in examples()["vllm.yaml"] if each["kind"] == "Deployment"]
    spec = deployment["spec"]["template"]["spec"]
    (path,) = [volume["csi"]["volumeAttributes"]["path"] for volume in spec["volumes"] if "csi" in volume]
    affinity = spec["affinity"]["nodeAffinity"]
    assert affinity.keys() == {"preferredDuringSchedulingIgnoredDuringExecution"}  # never required: it may be nowhere
    ((term,),) = [
        each["preference"]["matchExpressions"] for each in affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    ]
    assert term["key"] == label_key(PREFIX, path)
    assert (term["operator"], int(term["values"][0]) < 100) == ("Gt", True)
