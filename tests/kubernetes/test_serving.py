"""Containers of the manifests at work: while the store is away, and as Prometheus finds them."""

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.csi.driver import needs_root
from tests.kubernetes.manifests import examples, pod_of
from tests.kubernetes.pods import TIMEOUT_S, Node, Pod, a_node
from tests.support.mounts import wait_until

pytestmark = [needs_root, pytest.mark.alone]  # its namespaces hold copies of others' mounts

PARAMS = os.urandom(1_000_000)
TOKEN = "0123456789abcdef0123456789abcdef"
ASK = """
import sys, urllib.request
question = urllib.request.Request("http://127.0.0.1:9099/metrics")
question.add_header("Authorization", f"Bearer {sys.argv[1]}")
print(urllib.request.urlopen(question).read().decode())
"""


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with a keeper. Its paths are short: sockets' names have 107 bytes."""
    with (
        tempfile.TemporaryDirectory(prefix="k8s-", ignore_cleanup_errors=True) as directory,
        a_node(Path(directory), {"resnet50/params": PARAMS}) as found,
    ):
        pod(found, "trimsfs-keeper").start("keeper").ready()
        yield found


def pod(on: Node, daemonset: str) -> Pod:
    """The pod that a DaemonSet makes on the node."""
    return Pod(on, daemonset, copy.deepcopy(pod_of(daemonset)))


@pytest.mark.slow
def test_a_server_that_starts_while_the_store_is_away_is_left_to_serve_what_is_cached(node: Node) -> None:
    first = pod(node, "trimsfs").start("server").ready()
    assert (node.mountpoint / "resnet50/params").read_bytes() == PARAMS
    node.store.rename(node.store.with_name("away"))
    first.kill()

    second = pod(node, "trimsfs").start("server").ready()

    assert (node.mountpoint / "resnet50/params").read_bytes() == PARAMS
    wait_until(lambda: second.probe("readinessProbe") == 1, timeout_s=TIMEOUT_S)
    assert (second.probe("startupProbe"), second.probe("livenessProbe")) == (0, 0)


@pytest.mark.slow
def test_the_exporter_of_the_example_tells_who_has_the_token(node: Node) -> None:
    pod(node, "trimsfs").start("server").ready()
    (daemonset,) = examples()["metrics"]
    spec = daemonset["spec"]["template"]["spec"]
    (volume,) = [each for each in spec["volumes"] if "secret" in each]
    file = node.secret(volume["secret"]["secretName"]) / "token"
    file.parent.mkdir(parents=True)
    file.write_text(TOKEN)
    exporter = Pod(node, "exporter", spec).start("exporter")

    def told(token: str) -> str:
        return exporter.execute("python3", "-c", ASK, token).stdout

    wait_until(
        lambda: 'trimsfs_up{mountpoint="/var/lib/trimsfs/mounts/models"} 1.0' in told(TOKEN), timeout_s=TIMEOUT_S
    )
    assert told(TOKEN[::-1]) == ""
