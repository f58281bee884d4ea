"""Two nodes by the manifests of the fleet's example: one gets from the other, and goes on when it is gone.

See `tests.kubernetes.fleet_nodes` for what is emulated.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.csi.driver import needs_root
from tests.fleet.reading import undisturbed
from tests.kubernetes.fleet_nodes import RATE, Cluster, a_cluster
from tests.kubernetes.pods import TIMEOUT_S
from tests.support.mounts import wait_until
from trimsfs.extras.fleet.protocol import AWAY_S
from trimsfs.fetch.bypass import HEAD_BYTES

pytestmark = [needs_root, pytest.mark.alone, pytest.mark.slow]  # its namespaces hold copies of others' mounts

SIZE = 59 << 20
"""Of a file: seven chunks and a part of one. Either node is the owner of some."""
DRAIN = ("mountctl", "fleet", "{}", "--mounts-dir=/etc/trimsfs-mounts")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        tempfile.TemporaryDirectory(prefix="k8s-", ignore_cleanup_errors=True) as directory,
        a_cluster(Path(directory), [{}, {}]) as found,
    ):
        yield found


def test_a_node_gets_what_another_has_without_the_store(cluster: Cluster) -> None:
    first, second = cluster.nodes

    def sent(number: int) -> tuple[str, bytes, float]:
        name = f"params-{number}"
        content = cluster.put(name, SIZE)
        before = cluster.store.sent_bytes()
        assert first.read(name) == content
        return name, content, cluster.store.sent_bytes() - before

    name, content, by_store = undisturbed([first, second], sent)
    assert SIZE <= by_store < 1.02 * SIZE + 2 * HEAD_BYTES
    before, served = second.received(), first.mount.metrics()["trimsfs_fleet_served_sent_bytes_total"]
    with cluster.store.host.unplugged():
        assert second.read(name) == content
    received = second.received() - before
    assert 0 < received < SIZE
    wait_until(lambda: first.mount.metrics()["trimsfs_fleet_served_sent_bytes_total"] == served + received)


def test_the_nodes_are_ready_and_alive(cluster: Cluster) -> None:
    for each in cluster.nodes:
        assert each.mount.metrics()["trimsfs_fleet_failing_members"] == 0
        assert each.is_ready()
        for name in ("keeper", "server"):
            assert each.containers[name].probe("livenessProbe") == 0


def test_a_node_is_drained_in_the_container_of_nginx(cluster: Cluster) -> None:
    first, second = cluster.nodes
    for action, sends in (("drain", False), ("undrain", True)):
        done = first.containers["nginx"].execute(*(word.format(action) for word in DRAIN))
        assert done.returncode == 0, done.stderr
        time.sleep(AWAY_S)  # for so long, nobody asks who was drained
        content = cluster.put(action, SIZE)
        assert first.read(action) == content
        before = second.received()
        assert second.read(action) == content
        assert (second.received() > before) == sends


def test_a_node_that_goes_away_costs_no_error_and_comes_back_at_another_address(cluster: Cluster) -> None:
    lost, left = cluster.nodes
    known = cluster.put("known", SIZE)
    assert lost.read("known") == known
    cached = lost.mount.metrics()["trimsfs_disk_used_bytes"]

    lost.network.unplug()
    lost.lose_power()
    content = cluster.put("meanwhile", SIZE)
    assert left.read("known") == known
    assert left.read("meanwhile") == content
    wait_until(lambda: left.mount.metrics()["trimsfs_fleet_failing_members"] == 1)
    assert left.is_ready()
    cluster.announce([left])
    assert left.mount.metrics()["trimsfs_fleet_failing_members"] == 0

    lost.network = cluster.network.host(RATE)
    lost.start()
    cluster.announce([lost, left])
    wait_until(lambda: {"known", "meanwhile"} <= {path.name for path in lost.volume.iterdir()}, TIMEOUT_S)
    sizes = [(lost.volume / name).stat().st_size for name in ("known", "meanwhile")]
    assert sizes == [SIZE, SIZE]
    assert lost.mount.metrics()["trimsfs_disk_used_bytes"] == cached
    before = lost.received()
    with cluster.store.host.unplugged():
        assert lost.read("known") == known
        assert lost.received() == before
        assert lost.read("meanwhile") == content
    assert lost.received() > before
