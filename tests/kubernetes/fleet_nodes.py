"""Nodes of a cluster that are a fleet, by the example's manifests: what the kubelet would run runs in crun.

Each pod has an address of its own on one network, with the store and a name server. Emulated are the kubelet, which
starts the containers and asks their probes, and the API server, whose part is that the service's name leads to the
addresses of the pods. crun, dnsmasq, nginx and SeaweedFS are real.
"""

import copy
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.fleet.stores import BUCKET, FleetStore, a_real_store
from tests.kubernetes.manifests import Manifest, one, pod_of, with_fleet
from tests.kubernetes.pods import TIMEOUT_S, Container, Node, Pod, a_node
from tests.services.names import NameServer, a_name_server
from tests.support.certificates import Authority
from tests.support.mounts import MountedStore, let_in, wait_until
from tests.support.network import MEGABIT, Host, Network, a_network

RATE = 1000 * MEGABIT
READ_S = 60
DOMAIN = "cluster.local"
SERVICE = f"trimsfs-fleet.trimsfs.svc.{DOMAIN}"
CONTAINERS = ("server", "nginx", "csi")
"""Of the pod, those of trimsfs; the others are Kubernetes'."""
MODEL = "llama"
"""The directory of the store that a volume has on each node."""
SETTINGS = {
    'store = "s3://my-models"': f'store = "s3://{BUCKET}"\nmetadata_ttl = 1',
    'cache_size = "500GiB"': 'cache_size = "1GiB"',
    'min_free = "20GiB"': 'min_free = "1MiB"',
}
"""What an operator changes in the ConfigMap."""


@dataclass(slots=True)
class FleetNode:
    """A node with its pods, whose image is this tree but for some files that are *replaced*."""

    node: Node
    daemonset: Manifest
    replaced: Mapping[str, Path]
    network: Host
    containers: dict[str, Container] = field(default_factory=dict)
    volume: Path = Path("/nowhere")

    @property
    def mount(self) -> MountedStore:
        return self.node.mount

    def start(self) -> None:
        """Start the pods, and publish a volume with the model for a pod that reads."""
        keeper = Pod(self.node, "keeper", copy.deepcopy(pod_of("trimsfs-keeper")))
        self.containers["keeper"] = keeper.start("keeper", self.replaced).ready()
        pod = Pod(self.node, "trimsfs", copy.deepcopy(self.daemonset["spec"]["template"]["spec"]), self.network)
        for name in CONTAINERS:
            self.containers[name] = pod.start(name, self.replaced)
        wait_until(self.is_ready, timeout_s=TIMEOUT_S)
        self.volume = self.node.publish("reader", MODEL)

    def is_ready(self) -> bool:
        """Whether the readiness probes succeed; that of the driver asks a container of Kubernetes'."""
        for container in self.containers.values():
            assert container.process.poll() is None, container.said
        return all(self.containers[name].probe("readinessProbe") == 0 for name in ("keeper", "server", "nginx"))

    def lose_power(self) -> None:
        """End all containers at once."""
        for container in reversed(list(self.containers.values())):
            container.kill()
        self.containers.clear()

    def read(self, name: str) -> bytes:
        """A file of the model, read by a program from the pod's volume."""
        done = subprocess.run(["cat", self.volume / name], capture_output=True, timeout=READ_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def received(self) -> float:
        """Bytes that came from other nodes so far."""
        return self.mount.metrics()["trimsfs_fleet_received_bytes_total"]


@dataclass(slots=True)
class Cluster:
    """Some nodes, on a network with a store and a name server."""

    network: Network
    store: FleetStore
    names: NameServer
    nodes: list[FleetNode] = field(default_factory=list)

    def announce(self, nodes: Sequence[FleetNode]) -> None:
        """Have the service lead to the pods of these nodes, as its controller does, and wait until they know."""
        self.names.tell(SERVICE, [each.network.address for each in nodes])
        for each in nodes:
            wait_until(lambda: each.mount.metrics()["trimsfs_fleet_members"] == len(nodes), TIMEOUT_S)  # noqa: B023

    def put(self, name: str, size: int) -> bytes:
        """Add a file to the model, and wait until all nodes show it; its content."""
        content = random.Random(name).randbytes(size)
        self.store.put({f"{MODEL}/{name}": content})
        for each in self.nodes:
            if each.containers:
                wait_until((each.volume / name).exists)  # for up to a second, a new name is not there yet
        return content


@contextmanager
def a_cluster(directory: Path, images: Sequence[Mapping[str, Path]]) -> Iterator[Cluster]:
    """A cluster with a node for each image, all of whose pods are ready; *images* are the files that each replaces.

    The directory's path is short: sockets' names have 107 bytes.
    """
    let_in(directory)
    (directory / "manifests").mkdir()
    documents = with_fleet(directory / "manifests")
    authority = Authority(directory)
    with ExitStack() as stack:
        network = stack.enter_context(a_network())
        store = stack.enter_context(a_real_store(network.host(RATE)))
        store.put({f"{MODEL}/labels": b"cat\n"})
        names = stack.enter_context(a_name_server(network.host(RATE), directory, DOMAIN))
        cluster = Cluster(network, store, names)
        for number, replaced in enumerate(images, 1):
            name, place = f"node-{number}", directory / str(number)
            place.mkdir()
            node = stack.enter_context(a_node(place, {}, name=name, name_server=names.host.address))
            _configure(node, documents, store, authority)
            daemonset = one(documents, "DaemonSet", "trimsfs")
            cluster.nodes.append(FleetNode(node, daemonset, replaced, network.host(RATE)))
        names.tell(SERVICE, [each.network.address for each in cluster.nodes])
        for each in cluster.nodes:
            each.start()
        cluster.announce(cluster.nodes)
        yield cluster


def _configure(node: Node, documents: tuple[Manifest, ...], store: FleetStore, authority: Authority) -> None:
    """Write the ConfigMaps and Secrets of a node."""
    for name in ("trimsfs", "trimsfs-fleet"):
        node.config_map(name).mkdir(exist_ok=True)
        for file, text in one(documents, "ConfigMap", name)["data"].items():
            for before, after in SETTINGS.items() if file == "config.toml" else ():
                assert before in text
                text = text.replace(before, after)  # noqa: PLW2901 - one after the other
            (node.config_map(name) / file).write_text(text)
    member = authority.identity(store.host.address)  # its name counts for nothing
    certificates = {"tls.crt": member.certificate, "tls.key": member.key, "ca.crt": authority.certificate}
    node.secret("trimsfs-fleet").mkdir(parents=True)
    for name, source in certificates.items():
        shutil.copy(source, node.secret("trimsfs-fleet") / name)
    node.secret("trimsfs-credentials").mkdir()
    for name, value in store.environment().items():
        if name.startswith("AWS_"):
            (node.secret("trimsfs-credentials") / name).write_text(value)
