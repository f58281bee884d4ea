"""Pods of the former release under the DaemonSets of this one, and back: keeper, server and driver are replaced.

Containers of the manifests, run by crun. The image of the former release is this host's programs with the former
release's trimsfs and mountctl, see `tests.support.former_release`; Python and its packages are those of this one.
"""

import copy
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.csi.driver import needs_root
from tests.kubernetes.fleet_nodes import a_cluster
from tests.kubernetes.former_messages import record, shape
from tests.kubernetes.manifests import pod_of
from tests.kubernetes.pods import CONFIGURATION, MOUNTPOINT, TIMEOUT_S, Container, Node, Pod, a_node
from tests.support.former_release import MESSAGES, VERSION, former_release
from tests.support.mounts import wait_until
from tests.support.readers import PodReaders
from tests.support.survival import Survived
from trimsfs import __version__

pytestmark = [needs_root, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(900)]

PODS = {"keeper": "trimsfs-keeper", "server": "trimsfs", "csi": "trimsfs"}
VERSIONS = {"former": VERSION, "this": __version__}
READERS = 3
COLD = 8
FILES = {f"warm/{number}": random.Random(number).randbytes(6_000_000) for number in range(4)} | {
    f"cold/{number}": random.Random(10 + number).randbytes(9_000_000) for number in range(COLD)
}
"""Some that pods read all the time, and some that nobody has read."""
Step = tuple[str, str]
"""A container, and the release that takes its place."""
ORDERS: dict[str, Sequence[Step]] = {
    "servers first": (
        *(("csi", "this"), ("server", "this"), ("keeper", "this")),
        *(("server", "former"), ("keeper", "former"), ("csi", "former")),
    ),
    "keepers first": (
        *(("keeper", "this"), ("server", "this"), ("csi", "this")),
        *(("keeper", "former"), ("server", "former"), ("csi", "former")),
    ),
}
"""An upgrade, and the way back. Together they have each pair of keeper and server, and each change of one under the
other."""


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return former_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty directory whose path leaves room for those of sockets."""
    with tempfile.TemporaryDirectory(prefix="k8s-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@dataclass(slots=True)
class Upgrading:
    """A node whose containers are of either release."""

    node: Node
    images: Mapping[str, Mapping[str, Path]]
    containers: dict[str, Container] = field(default_factory=dict)
    logs: list[Path] = field(default_factory=list)

    def replace(self, name: str, release: str) -> None:
        """End a container if there is one, as the controller of its DaemonSet does, and start that of a release."""
        before = self.serving_pid() if "server" in self.containers else None
        if name in self.containers:
            assert self.containers.pop(name).stop() == 0
        pod = Pod(self.node, name, copy.deepcopy(pod_of(PODS[name])))
        container = self.containers[name] = pod.start(name, self.images[release])
        self.logs.append(container.log)
        match name:
            case "keeper":
                container.ready()
                if before is not None:
                    wait_until(lambda: self.serving_pid() != before, TIMEOUT_S, tolerate=OSError)
                done = container.execute("mountctl", "keeper", "--check", MOUNTPOINT)
                assert f"trimsfs {VERSIONS[release]}," in done.stdout
            case "server":
                container.serving()
                wait_until(lambda: self.fact("version") == VERSIONS[release], TIMEOUT_S, tolerate=OSError)

    def fact(self, name: str) -> object:
        """What the server says of itself."""
        return json.loads((self.node.mountpoint / ".trims/control").read_text())[name]

    def serving_pid(self) -> object:
        return self.fact("server_pid")


@contextmanager
def upgrading(directory: Path, former: Mapping[str, Path]) -> Iterator[Upgrading]:
    """A node where the former release serves."""
    with a_node(directory, FILES) as node:
        (node.config_map() / "config.toml").write_text(f'{CONFIGURATION}prefetch = "off"\n')
        on = Upgrading(node, {"former": former, "this": {}})
        for name in PODS:
            on.replace(name, "former")
        yield on
        assert not [log for log in on.logs if "Traceback" in log.read_text()]


@pytest.mark.parametrize("order", ORDERS)
def test_pods_read_on_while_one_release_takes_the_place_of_the_other(
    order: str, former: Mapping[str, Path], short_path: Path, tmp_path: Path, survived: Survived
) -> None:
    with upgrading(short_path, former) as on:
        warm = on.node.publish("readers", "warm")
        device = warm.stat().st_dev
        readers = PodReaders(warm, on.node.store / "warm", tmp_path, count=READERS)
        try:
            for number in range(4):
                assert (warm / f"{number}").read_bytes() == FILES[f"warm/{number}"]
            for number, (name, release) in enumerate(ORDERS[order]):
                on.replace(name, release)
                if name != "csi":
                    assert on.node.mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == 0  # the cache stays
                    assert on.fact("passthrough") == {"used": True}
                assert on.node.publish("readers", "warm") == warm  # as the kubelet does each minute
                cold = on.node.publish(f"pod-{number}", "cold")
                assert (cold / f"{number}").read_bytes() == FILES[f"cold/{number}"]
                if number:
                    on.node.unpublish(f"pod-{number - 1}")
                for which in ("keeper", "server"):
                    wait_until(lambda: on.containers[which].probe("readinessProbe") == 0, TIMEOUT_S)  # noqa: B023
        finally:
            report = readers.stop(TIMEOUT_S)
        assert warm.stat().st_dev == device
        on.node.unpublish(f"pod-{len(ORDERS[order]) - 1}")
        on.node.unpublish("readers")
    survived(
        f"keeper, server and driver of the former release are replaced by this one's and back, {order}",
        injected=len(ORDERS[order]),
        operations=report.operations,
        errors=report.unexpected() + report.errnos,
        wrong=len(report.wrong),
        recovery_s=max(report.worst_s.values()),
    )
    assert (report.errors, report.wrong) == ([], [])


def test_nodes_of_both_releases_are_one_fleet(former: Mapping[str, Path], short_path: Path) -> None:
    size = 59 << 20
    with a_cluster(short_path, [former, {}]) as cluster:
        for asked, asks in (cluster.nodes, reversed(cluster.nodes)):
            name = f"of-{asked.node.name}"
            content = cluster.put(name, size)
            assert asked.read(name) == content
            before = asks.received()
            with cluster.store.host.unplugged():
                assert asks.read(name) == content
            assert 0 < asks.received() - before < size


def test_the_messages_that_are_kept_are_those_of_the_former_release(
    former: Mapping[str, Path], short_path: Path
) -> None:
    kept, recorded = (
        {shape(said) for conversation in conversations for said in conversation}
        for conversations in (json.loads(MESSAGES.read_text()), record(former, short_path))
    )
    assert kept == recorded, "run `.venv/bin/python -m tests.kubernetes.former_messages`"
