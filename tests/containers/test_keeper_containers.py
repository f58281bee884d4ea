"""Keeper and servers in containers of crun's, readers as in pods: servers are killed and replaced, and the keeper too.

The root of the containers is that of the host, read-only. The server has the capabilities of packaging/kubernetes and
no others, the keeper three in place of all. A newer image is the same with another version number.
"""

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import trimsfs
from tests.containers.engines import apart, run
from tests.kubernetes.manifests import container, pod_of
from tests.kubernetes.pods import own_capabilities
from tests.support.mounts import MOUNTCTL, TRIMSFS, wait_until
from tests.support.mounts import trimsfs as command
from tests.support.nodes import TIMEOUT_S, Node, a_node
from tests.support.readers import PodReaders
from tests.support.survival import Survived

KILLS, NEWER, READERS = 50, 50, 4
FILES = {f"resident/{number}": random.Random(number).randbytes(6_000_000) for number in range(2)} | {
    f"cold/{number}": random.Random(10 + number).randbytes(6_000_000) for number in range(8)
}
CACHE_SIZE = "36MiB"
"""Holds half of FILES: what is read is fetched and evicted all the time."""
OF_KEEPER = ["DAC_OVERRIDE", "KILL", "SYS_ADMIN"]
SOCKETS = "/run/trimsfs"


@dataclass(slots=True)
class Containers:
    """The containers of a node, by the names that crun knows them by."""

    node: Node
    root: Path
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.node.directory / "crun"

    def keeper(self, name: str) -> None:
        """Start a keeper's container, in the host's PID namespace."""
        mounts = [
            _bind("/sys", "rbind", "rw"),
            _bind("/dev/fuse", "bind"),
            _bind(SOCKETS, "rbind", "rw"),
            _bind(self.node.mountpoint.parent, "rbind", "rw", "rshared"),
        ]
        command: list[str | Path] = [MOUNTCTL, "keeper", self.node.mountpoint]
        self._start(name, command, OF_KEEPER, mounts, ["mount", "ipc", "network"], propagation="rshared")

    def server(self, name: str, *, image: Path | None = None) -> None:
        """Start a server's container, perhaps of another *image*, which has another ``trimsfs/__init__.py``."""
        cache = self.node.directory / "cache"
        cache.mkdir(exist_ok=True)
        mounts = [
            _bind(cache, "rbind", "rw"),
            _bind(SOCKETS, "rbind", "rw"),
            _bind(self.node.mountpoint.parent, "rbind", "ro", "rslave"),
            *([_bind(image, "bind", "ro", at=trimsfs.__file__)] if image is not None else []),
        ]
        serve: list[str | Path] = [TRIMSFS, "serve", self.node.store, self.node.mountpoint, "--cache-dir", cache]
        options = ["--cache-size", CACHE_SIZE, "--cold-open", "stream"]
        capabilities = container(pod_of("trimsfs"), "server")["securityContext"]["capabilities"]["add"]
        self._start(name, [*serve, *options], capabilities, mounts, ["mount", "ipc", "uts", "pid"])

    def _start(
        self,
        name: str,
        arguments: Sequence[str | Path],
        capabilities: Iterable[str],
        mounts: list[dict[str, Any]],
        namespaces: Sequence[str],
        propagation: str = "rslave",
    ) -> None:
        bundle = self.node.directory / "bundles" / name
        bundle.mkdir(parents=True)
        # The host of the tests may have fewer.
        allowed = [f"CAP_{each}" for each in capabilities if each in own_capabilities()]
        configuration = {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": list(map(str, arguments)),
                "env": ["PATH=/usr/bin:/bin", "TRIMSFS_CONFIG=/dev/null", "PYTHONDONTWRITEBYTECODE=1"],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), allowed),
                "noNewPrivileges": True,
            },
            "root": {"path": str(self.root), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                *mounts,
            ],
            "linux": {"namespaces": [{"type": kind} for kind in namespaces], "rootfsPropagation": propagation},
        }
        (bundle / "config.json").write_text(json.dumps(configuration))
        with (self.node.directory / "containers.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                apart(*self._crun("run", "--bundle", bundle, name)), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the first process of a container, and wait for the end of all of them."""
        process = self.running.pop(name)
        run(*apart(*self._crun("kill", name, str(int(number)))))
        process.wait(TIMEOUT_S)
        run(*apart(*self._crun("delete", "--force", name)))

    def _crun(self, *arguments: str | Path) -> list[str | Path]:
        return ["crun", "--root", self.state, "--cgroup-manager=disabled", *arguments]

    def serves(self, version: str) -> bool:
        """Whether a server of a version answers."""
        return bool(self.node.mount.control()["version"] == version)

    def log(self) -> str:
        return (self.node.directory / "containers.log").read_text()


def _bind(source: str | Path, *options: str, at: str | Path | None = None) -> dict[str, Any]:
    return {"destination": str(at or source), "type": "bind", "source": str(source), "options": list(options)}


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Containers]:
    """Containers on a node, none of which runs yet."""
    root = tmp_path / "root"
    root.mkdir()
    Path(SOCKETS).mkdir(exist_ok=True)
    with a_node(tmp_path, FILES) as node:
        found = Containers(node, root)
        for mount in (["mount", "--bind", "/", str(root)], ["mount", "--make-private", str(root)]):
            subprocess.run(mount, check=True, timeout=10)
        try:
            yield found
        finally:
            for name in list(found.running):
                with suppress(subprocess.TimeoutExpired):
                    found.stop(name)
            subprocess.run(["umount", "--lazy", root], check=True, timeout=10)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_readers_in_pods_notice_neither_lost_nor_newer_containers(
    containers: Containers, survived: Survived, tmp_path: Path
) -> None:
    node, version = containers.node, trimsfs.__version__
    containers.keeper("keeper-0")
    containers.server("server-0")
    serving = node.serving()
    device = node.mountpoint.stat().st_dev
    for path in [path for path in FILES if path.startswith("resident/")]:
        assert command("pin", "--best-effort", node.mountpoint / path).returncode == 0
    (tmp_path / "reports").mkdir()
    readers = PodReaders(node.mountpoint, node.store, tmp_path / "reports", count=READERS)
    try:
        for number in range(1, KILLS + 1):
            time.sleep(random.Random(number).uniform(0.2, 1.5))
            command("evict", node.mountpoint / "cold")  # but for what is in use
            containers.stop(f"server-{number - 1}")
            containers.server(f"server-{number}")
            serving = node.serving(not_by=serving)
            if number == KILLS // 2:
                containers.stop("keeper-0", signal.SIGTERM)
                time.sleep(1)  # the server serves on
                containers.keeper("keeper-1")
                wait_until(lambda: node.check() == 0, timeout_s=TIMEOUT_S)
                serving = node.serving(not_by=serving)
        last = f"server-{KILLS}"
        for number in range(1, NEWER + 1):
            newer, version = tmp_path / f"image-{number}.py", f"9.{number}.0"
            newer.write_text(Path(trimsfs.__file__).read_text().replace(trimsfs.__version__, version))
            containers.stop(last)
            last = f"newer-{number}"
            containers.server(last, image=newer)
            serving = node.serving(not_by=serving)
            assert containers.serves(version)
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
    assert "Traceback" not in containers.log()
