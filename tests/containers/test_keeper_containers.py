"""Keeper and servers in containers of crun's, readers as in pods: servers are killed and replaced, and the keeper too.

The containers are those of packaging/kubernetes. A newer image is the same with another version number.
"""

import copy
import json
import random
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import trimsfs
from tests.kubernetes.manifests import pod_of
from tests.kubernetes.pods import CONFIGURATION, TIMEOUT_S, Container, Pod, a_node
from tests.support.mounts import trimsfs as command
from tests.support.mounts import wait_until
from tests.support.readers import PodReaders
from tests.support.survival import Survived

KILLS, NEWER, READERS = 50, 50, 4
FILES = {f"resident/{number}": random.Random(number).randbytes(6_000_000) for number in range(2)} | {
    f"cold/{number}": random.Random(10 + number).randbytes(6_000_000) for number in range(8)
}
SMALL_CACHE = 'cache_size = "36MiB"\ncold_open = "stream"\n'
"""Holds half of FILES: what is read is fetched and evicted all the time."""


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(2400)
def test_readers_in_pods_notice_neither_lost_nor_newer_containers(survived: Survived, tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="k8s-", ignore_cleanup_errors=True) as directory,
        a_node(Path(directory), FILES) as node,
    ):
        (node.config_map() / "config.toml").write_text(CONFIGURATION + SMALL_CACHE)
        pods = {name: Pod(node, name, copy.deepcopy(pod_of(name))) for name in ("trimsfs-keeper", "trimsfs")}

        def start_server(image: Path | None = None) -> Container:
            return pods["trimsfs"].start("server", {} if image is None else {trimsfs.__file__: image}).serving()

        def fact(name: str) -> object:
            return json.loads((node.mountpoint / ".trims/control").read_text())[name]

        def taken_over(before: object) -> bool:
            return fact("server_pid") != before

        keeper, server = pods["trimsfs-keeper"].start("keeper").ready(), start_server()
        device = node.mountpoint.stat().st_dev
        for path in FILES:
            if path.startswith("resident/"):
                assert command("pin", "--best-effort", node.mountpoint / path).returncode == 0
        logs = [keeper.log, server.log]
        readers = PodReaders(node.mountpoint, node.store, tmp_path, count=READERS)
        try:
            for number in range(1, KILLS + 1):
                time.sleep(random.Random(number).uniform(0.2, 1.5))
                command("evict", node.mountpoint / "cold")  # but for what is in use
                server.kill()
                server = start_server()
                logs.append(server.log)
                if number == KILLS // 2:
                    assert node.crun("kill", keeper.name, "TERM").returncode == 0
                    assert keeper.ended() == 0
                    time.sleep(1)  # the server serves on
                    before = fact("server_pid")
                    keeper = pods["trimsfs-keeper"].start("keeper").ready()
                    logs.append(keeper.log)
                    wait_until(partial(taken_over, before), timeout_s=TIMEOUT_S, tolerate=OSError)  # ESTALE
            for number in range(1, NEWER + 1):
                newer, version = tmp_path / f"image-{number}.py", f"9.{number}.0"
                newer.write_text(Path(trimsfs.__file__).read_text().replace(trimsfs.__version__, version))
                server.kill()
                server = start_server(newer)
                logs.append(server.log)
                assert fact("version") == version
                time.sleep(1)
        finally:
            report = readers.stop(timeout_s=TIMEOUT_S)
        print(f"{KILLS} kills, {NEWER} newer images, the keeper replaced once: {report.operations} operations")
        print(f"longest, in seconds: { ({kind: round(worst, 2) for kind, worst in sorted(report.worst_s.items())}) }")
        survived(
            f"the server's container is killed {KILLS} times and replaced by a newer one {NEWER} times, "
            "the keeper's is replaced once",
            injected=KILLS + NEWER + 1,
            operations=report.operations,
            errors=report.unexpected() + Counter(report.errnos),
            wrong=len(report.wrong),
            recovery_s=max(report.worst_s.values()),
        )
        assert (report.errors, report.wrong) == ([], [])
        assert node.mountpoint.stat().st_dev == device
        assert not [log for log in logs if "Traceback" in log.read_text()]
