"""Containers as tests start them: podman, crun, runc, bubblewrap and unshare, without network and control groups.

Runtimes want control groups of version 2 at /sys/fs/cgroup. Where the host has others, each command gets a mount
namespace of its own in which they are there; mounts of shared directories reach it as they reach any container.
"""

import json
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.mounts import MOUNTCTL, wait_until
from tests.support.processes import alive

TIMEOUT_S = 60
APPLETS = ("cat", "find", "grep", "ls", "ln", "mkdir", "mv", "rm", "rmdir", "sh", "sha256sum", "sleep", "stat")
SUB_IDS = 100_000
"""Where the users of user namespaces begin on the host."""
DEVICES = Path("/var/run/cdi")
PACKAGING = Path(__file__).parents[2] / "packaging/oci"

_PRELUDE = """
mount --make-rprivate /sys
[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup
[ -z "$TEST_DEVICES" ] || { mkdir -p /var/run/cdi; mount --bind "$TEST_DEVICES" /var/run/cdi; }
exec "$@"
"""


def run(
    *command: str | Path, environment: Mapping[str, str] | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, whatever it returns."""
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT_S,
        check=False,
        **options,
    )


def apart(*command: str | Path) -> list[str]:
    """A command line that runs a command where runtimes find what they want."""
    return ["unshare", "-m", "--propagation", "unchanged", "sh", "-ec", _PRELUDE, "-", *map(str, command)]


def mountctl(*arguments: str | Path, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run ``mountctl``, whatever it returns."""
    return run(MOUNTCTL, *arguments, **options)


@contextmanager
def running(*command: str | Path) -> Iterator["subprocess.Popen[str]"]:
    """A process for the length of the block, ended and waited for in any case."""
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def make_root(directory: Path) -> None:
    """A root file system with a shell and the probe."""
    for name in ("bin", "dev", "etc", "opt", "proc", "sys", "tmp"):
        (directory / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, directory / "bin/busybox")
    for name in APPLETS:
        (directory / "bin" / name).symlink_to("busybox")
    (directory / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")
    probe = Path(__file__).with_name("probe.c")
    subprocess.run(["gcc", "-O1", "-static", "-o", directory / "bin/probe", probe], check=True, timeout=TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Podman:
    """Podman with storage and devices of its own."""

    directory: Path
    image: str = "localhost/trimsfs-test"

    @property
    def devices(self) -> Path:
        """Where it finds CDI specs."""
        return self.directory / "cdi"

    @property
    def environment(self) -> dict[str, str]:
        """What makes any other podman command the same podman."""
        return {
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
            "TEST_DEVICES": str(self.devices),
        }

    def configure(self) -> None:
        """Make its configuration."""
        self.devices.mkdir(parents=True)
        (self.directory / "containers.conf").write_text(
            '[containers]\ncgroups = "disabled"\nnetns = "none"\nlog_driver = "none"\ndefault_ulimits = []\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\nruntime = "crun"\n'
            f'tmp_dir = "{self.directory}/tmp"\n'
        )
        (self.directory / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{self.directory}/images"\nrunroot = "{self.directory}/run"\n'
        )

    def set_up(self, root: Path) -> None:
        """Make its configuration and its image."""
        self.configure()
        archive = self.directory / "root.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(root, ".")
        done = self("import", archive, self.image)
        assert done.returncode == 0, done.stderr

    def __call__(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return run(*apart("podman", *arguments), environment=self.environment)

    def run(self, *options: str, command: Sequence[str]) -> str:
        """What a command in a container of its own prints."""
        done = self("run", "--rm", *options, self.image, *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def started(self, *options: str, command: Sequence[str] = ("sleep", "300")) -> Iterator["PodmanContainer"]:
        """A container for the length of the block."""
        name = f"trimsfs-{uuid.uuid4().hex[:12]}"
        done = self("run", "--rm", "--detach", "--name", name, *options, self.image, *command)
        try:
            assert done.returncode == 0, done.stderr
            yield PodmanContainer(self, name)
        finally:
            pid = self("inspect", "--format", "{{.State.ConmonPid}}", name).stdout.strip()
            self("rm", "--force", "--time", "0", name)
            wait_until(lambda: not pid or not alive(int(pid)))


@dataclass(frozen=True, slots=True)
class PodmanContainer:
    """A container of podman's that runs."""

    podman: Podman
    name: str

    @property
    def pid(self) -> int:
        """Its first process."""
        return int(self.podman("inspect", "--format", "{{.State.Pid}}", self.name).stdout)

    def execute(self, *command: str, user: str | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a command in it."""
        return self.podman("exec", *(["--user", user] if user else []), self.name, *command)

    def read(self, *command: str, user: str | None = None) -> str:
        """What a command in it prints."""
        done = self.execute(*command, user=user)
        assert done.returncode == 0, done.stderr
        return done.stdout


@dataclass(frozen=True, slots=True)
class Users:
    """Who runs in a container: a user, and whether in a user namespace."""

    user: int
    namespace: bool

    @property
    def podman(self) -> list[str]:
        """For podman's command line."""
        ids = f"0:{SUB_IDS}:65536"
        namespace = ["--uidmap", ids, "--gidmap", ids] if self.namespace else []
        return ["--user", f"{self.user}:{self.user}", *namespace]


USERS = {"root": Users(0, False), "user": Users(1000, False), "namespace": Users(1000, True)}


def write_bundle(directory: Path, root: Path, command: Sequence[str], users: Users, **settings: Any) -> Path:
    """An OCI bundle; *settings* are put into its configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    namespaces = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]
    linux: dict[str, Any] = {"namespaces": namespaces, "rootfsPropagation": "rslave"}
    if users.namespace:
        namespaces.append({"type": "user"})
        ids = [{"containerID": 0, "hostID": SUB_IDS, "size": 65536}]
        linux |= {"uidMappings": ids, "gidMappings": ids}
    configuration = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": users.user, "gid": users.user},
            "args": list(command),
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": linux,
    }
    (directory / "config.json").write_text(json.dumps(configuration | settings))
    return directory


def run_bundle(runtime: str, bundle: Path) -> "subprocess.CompletedProcess[str]":
    """Run an OCI bundle to its end; nothing of it is left."""
    state, name = bundle / "state", f"trimsfs-{uuid.uuid4().hex[:12]}"
    try:
        return run(*apart(runtime, "--root", state, "run", "--bundle", bundle, name), stdin=subprocess.DEVNULL)
    finally:
        run(*apart(runtime, "--root", state, "delete", "--force", name))


def packaged(name: str) -> dict[str, Any]:
    """A file of packaging/oci, with the command where it is here."""
    text = (PACKAGING / name).read_text()
    assert "/usr/local/bin/mountctl" in text
    settings: dict[str, Any] = json.loads(text.replace("/usr/local/bin/mountctl", MOUNTCTL))
    return settings


def bundle(
    directory: Path,
    root: Path,
    script: str,
    users: Users = USERS["root"],
    *,
    models: str | None = None,
    mount: Path | str = "",
    gpu: str | None = None,
    log: Path | None = None,
) -> Path:
    """A bundle with the hook as it is packaged, and these annotations; crun writes to *log* what the hook says."""
    settings = packaged("config-snippet.json")
    annotations = {
        "dev.trimsfs.models": models,
        "dev.trimsfs.mount": str(mount) or None,
        "dev.trimsfs.gpu": gpu,
        "run.oci.hooks.stderr": None if log is None else str(log),
    }
    settings["annotations"] = {name: value for name, value in annotations.items() if value is not None}
    return write_bundle(directory / "bundle", root, ["sh", "-c", script], users, **settings)


def spec_of(*arguments: str | Path) -> dict[str, Any]:
    done = mountctl("cdi", *arguments, "--output", "-")
    assert done.returncode == 0, done.stderr
    spec: dict[str, Any] = json.loads(done.stdout)
    return spec
