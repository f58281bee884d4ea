"""A node of a cluster, as far as trimsfs goes: a keeper, and servers in mount and PID namespaces of their own."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mountctl.keeper.control_socket import KeeperGoneError, ask
from tests.support.mount_namespace import own_mounts
from tests.support.mounts import MOUNTCTL, TRIMSFS, MountedStore, let_in, settings, trimsfs, wait_until
from trimsfs.mountinfo import trimsfs_at

TIMEOUT_S = 60
_POD = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "slave")
"""Starts a program as a container's first process: it gets mounts of the host, and all ends with it."""
_HOST_PID = ("unshare", "--mount", "--propagation", "slave")
"""Starts it as in a pod with ``hostPID``: it sees all processes of the node."""


@dataclass(slots=True)
class Node:
    """A shared directory to mount in, and the processes of the node."""

    directory: Path
    store: Path
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def mountpoint(self) -> Path:
        return self.directory / "shared/models"

    @property
    def mount(self) -> MountedStore:
        return MountedStore(self.mountpoint, self.directory / "cache")

    def keeper(self, *before: str, after: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        """Start a keeper; it listens once `check` says so. *after* is another program than ``mountctl keeper``."""
        return self._start("keeper", [*before, *(after or (MOUNTCTL, "keeper")), str(self.mountpoint)])

    def server(
        self,
        *options: str | Path,
        store: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        host_pid: bool = False,
        before: tuple[str, ...] = (),
    ) -> "subprocess.Popen[bytes]":
        """Start a server's container: its first process is ``trimsfs serve``, or a program *before* that becomes it."""
        options, variables = settings(options)
        places = (store or self.store, self.mountpoint, "--cache-dir", self.directory / "cache")
        spaces = (*(_HOST_PID if host_pid else _POD), *own_mounts(self.directory))
        command = [*spaces, *before, TRIMSFS, "serve", *places, *options]
        return self._start("server", command, variables | dict(environment or {}))

    def _start(
        self, name: str, command: list[str | Path], environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRIMSFS_")}
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                env=inherited | {"TRIMSFS_CONFIG": "/dev/null"} | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        """What the keepers or the servers have said."""
        return (self.directory / f"{name}.log").read_text()

    def check(self) -> int:
        """The exit code of the probe of the keeper."""
        command = [MOUNTCTL, "keeper", "--check", str(self.mountpoint)]
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False).returncode

    def facts(self) -> dict[str, object]:
        """What the keeper says of its servers; nothing without one."""
        try:
            return ask(self.mountpoint, {"do": "status"}, timeout_s=5)
        except KeeperGoneError:
            return {}

    def serving(self, *, not_by: object = None, keeper: int | None = None) -> int:
        """Wait for a server that is ready, by its pid on the host; for the next one, or one of another keeper."""

        def ready() -> bool:
            facts = self.facts()
            right = keeper in (None, facts.get("keeper_pid"))
            return facts.get("state") == "serving" and facts["server_pid"] != not_by and right

        wait_until(ready, timeout_s=TIMEOUT_S)
        pid = self.facts()["server_pid"]
        assert isinstance(pid, int)
        return pid

    def close(self) -> None:
        """End everything, unmounted."""
        if trimsfs_at(self.mountpoint) is not None:
            trimsfs("umount", "--lazy", self.mountpoint)
        for process in self.processes:
            end(process)
        while trimsfs_at(self.mountpoint) is not None:
            trimsfs("umount", "--lazy", self.mountpoint)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process, as a container's is, and all that ends with it."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait(TIMEOUT_S)


@contextmanager
def a_node(directory: Path, files: Mapping[str, bytes]) -> Iterator[Node]:
    """A node, with files in a store; nothing of it is left."""
    node = Node(directory, directory / "store")
    for name, content in files.items():
        path = node.store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    node.store.mkdir(exist_ok=True)
    node.mountpoint.parent.mkdir()
    let_in(node.store)
    let_in(node.mountpoint.parent)
    shared = str(node.mountpoint.parent)
    for command in (["mount", "--bind", shared, shared], ["mount", "--make-rshared", shared]):
        subprocess.run(command, check=True, timeout=10)
    try:
        yield node
    finally:
        node.close()
        subprocess.run(["umount", "--lazy", shared], check=True, timeout=10)
