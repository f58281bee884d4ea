"""Containers of the manifests, run by crun as a kubelet has them run: command, user, capabilities, mounts, namespaces.

What differs: the root file system has this host's programs, not the image; there are no control groups; a pod has a
network only where a test gives it one; the store is a directory, unless the configuration names another; and the
default seccomp profile is that of podman, not of containerd, whose is much the same.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from mountctl.extras.csi import csi_pb2
from tests.containers.engines import apart, run
from tests.csi.driver import CALL_TIMEOUT_S, publication
from tests.kubernetes.manifests import ROOT, Manifest, container
from tests.services import accepts
from tests.support.mounts import MountedStore, let_in, wait_until
from tests.support.network import Host
from tests.support.processes import family

TIMEOUT_S = 60
STORE = "/store"
MOUNTPOINT = "/var/lib/trimsfs/mounts/models"
"""Where the manifests have the mount."""
PODS = "var/lib/kubelet/pods"
DRIVER_SOCKET = "var/lib/kubelet/plugins/models.trimsfs.dev/csi.sock"
SECCOMP = Path("/usr/share/containers/seccomp.json")
DEFAULT_CAPABILITIES = (
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
)
"""What containerd gives a container that says nothing."""
MASKED = (
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/scsi",
    "/sys/firmware",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
PROPAGATION = {None: "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}
RESOLVE = "search trimsfs.svc.cluster.local svc.cluster.local cluster.local\nnameserver {}\noptions ndots:5\n"
"""What the kubelet writes into ``/etc/resolv.conf`` of a pod of the namespace."""
CONFIGURATION = f'store = "{STORE}/models"\ncache_dir = "/var/cache/trimsfs/models"\nmin_free = "1MiB"\n'


@dataclass(slots=True)
class Pod:
    """A pod whose containers are started one by one. ``spec`` is the manifest's, and may be changed before.

    Its containers share a host of a *network*; without one, each is alone.
    """

    node: "Node"
    name: str
    spec: Manifest
    network: Host | None = None

    def container(self, name: str) -> Manifest:
        """The manifest of a container."""
        return container(self.spec, name)

    def start(self, name: str, replaced: Mapping[str, Path] | None = None) -> "Container":
        """Start a container, perhaps with files of its image *replaced* by others of this host."""
        return self.node.start(self, self.container(name), replaced or {})


@dataclass(slots=True)
class Container:
    """A container that was started; ``log`` is what it says."""

    node: "Node"
    name: str
    manifest: Manifest
    process: "subprocess.Popen[bytes]"
    log: Path
    network: Host | None

    def execute(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in it, as a probe."""
        return self.node.crun("exec", self.name, *command)

    def probe(self, which: str) -> int:
        """The exit code of a probe of the manifest; of one of a port, 0 if that takes connections."""
        match self.manifest[which]:
            case {"tcpSocket": {"port": str(name)}} if (network := self.network) is not None:
                (port,) = [each["containerPort"] for each in self.manifest["ports"] if each["name"] == name]
                return 0 if network.namespace.call(lambda: accepts(port, network.address)) else 1
            case {"exec": {"command": command}}:
                return self.execute(*command).returncode
            case other:
                raise AssertionError(f"this node has no {other}")

    def ready(self) -> "Container":
        """Wait for its startup probe; fails with its log if it ends before."""
        wait_until(lambda: self.process.poll() is not None or self.probe("startupProbe") == 0, timeout_s=TIMEOUT_S)
        assert self.process.poll() is None, self.said
        return self

    def serving(self) -> "Container":
        """Wait until a server says that it serves; fails with its log if it ends before."""
        wait_until(lambda: self.process.poll() is not None or ": serving " in self.said, timeout_s=TIMEOUT_S)
        assert self.process.poll() is None, self.said
        return self

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(TIMEOUT_S)

    def stop(self) -> int:
        """End it as the kubelet does that deletes its pod, by a signal; the exit code."""
        assert self.node.crun("kill", self.name, "TERM").returncode == 0
        code = self.ended()
        self.kill()
        return code

    @property
    def said(self) -> str:
        """What it has said."""
        return self.log.read_text()

    def kill(self) -> None:
        """End it with all its processes, which a kubelet's runtime knows by their control group."""
        for pid in reversed(family(self.process.pid)[1:]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.node.crun("delete", "--force", self.name)
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        self.node.started.remove(self)


@dataclass(slots=True)
class Node:
    """A node: the directories of the host that the manifests name lie in ``host``, which is shared.

    Its *files* are in a store of its own. Pods ask the *name_server*.
    """

    directory: Path
    files: Mapping[str, bytes]
    name: str = "node-1"
    name_server: str | None = None
    started: list[Container] = field(default_factory=list)

    @property
    def host(self) -> Path:
        """Where the host's directories are."""
        return self.directory / "host"

    @property
    def store(self) -> Path:
        """The directory that is the store. One that is renamed is an outage."""
        return self.directory / "store/models"

    @property
    def mountpoint(self) -> Path:
        """Where the host sees the mount."""
        return self.host / MOUNTPOINT.lstrip("/")

    @property
    def mount(self) -> MountedStore:
        """The mount, and its cache."""
        return MountedStore(self.mountpoint, self.host / "var/cache/trimsfs/models")

    def config_map(self, name: str = "trimsfs") -> Path:
        """The directory with the files of a ConfigMap."""
        return self.directory / "configMap" / name

    def secret(self, name: str) -> Path:
        """The directory with the files of a Secret."""
        return self.directory / "secret" / name

    def set_up(self) -> None:
        """Make the directories of the host, the configuration and the root file system."""
        let_in(self.directory)
        for name, content in self.files.items():
            (self.store / name).parent.mkdir(parents=True, exist_ok=True)
            (self.store / name).write_bytes(content)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.directory / "root" / name).parent.mkdir(exist_ok=True)
            (self.directory / "root" / name).symlink_to(f"usr/{name}")
        for name in ("dev", "etc", "proc", "sys"):
            (self.directory / "root" / name).mkdir()
        etc = self.directory / "root/etc"
        for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
            with suppress(FileNotFoundError):
                shutil.copy(Path("/etc") / name, etc)
        if self.name_server is not None:
            (etc / "resolv.conf").write_text(RESOLVE.format(self.name_server))
        configuration = self.config_map()
        configuration.mkdir(parents=True)
        (configuration / "config.toml").write_text(CONFIGURATION)
        (configuration / "tenants.toml").write_text('[[tenant]]\nnamespaces = ["*"]\n')
        self.host.mkdir()
        subprocess.run(["mount", "--bind", self.host, self.host], check=True, timeout=10)
        subprocess.run(["mount", "--make-rshared", self.host], check=True, timeout=10)

    def crun(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run crun."""
        return run(*apart("crun", "--root", self.directory / "crun", *arguments), stdin=subprocess.DEVNULL)

    def start(self, pod: Pod, manifest: Manifest, replaced: Mapping[str, Path]) -> Container:
        """Start a container of a pod."""
        # Its own on this host: crun names control groups by it.
        name = f"{pod.name}-{manifest['name']}-{uuid.uuid4().hex[:12]}"
        bundle = self.directory / name
        bundle.mkdir()
        configuration = self._configuration(pod, manifest)
        configuration["mounts"] += [_bind(file, name, "rprivate", "ro") for name, file in replaced.items()]
        (bundle / "config.json").write_text(json.dumps(configuration))
        log = self.directory / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                apart("crun", "--root", self.directory / "crun", "run", "--bundle", bundle, name),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self.started.append(Container(self, name, manifest, process, log, pod.network))
        return self.started[-1]

    def _configuration(self, pod: Pod, manifest: Manifest) -> dict[str, Any]:
        """The OCI configuration that containerd makes of a container."""
        context = {**pod.spec.get("securityContext", {}), **manifest.get("securityContext", {})}
        privileged, user = context.get("privileged", False), context.get("runAsUser", 0)
        capabilities = sorted(f"CAP_{name}" for name in _capabilities(context))
        held = {} if user else {"effective": capabilities, "permitted": capabilities}
        kinds = ["mount", "ipc", "uts", *([] if pod.spec.get("hostPID") else ["pid"])]
        network = {} if pod.network is None else {"path": str(pod.network.namespace.file)}
        volumes = self._volumes(pod, manifest)
        linux: dict[str, Any] = {
            "namespaces": [*({"type": kind} for kind in kinds), {"type": "network", **network}],
            "rootfsPropagation": "rshared" if any("rshared" in each["options"] for each in volumes) else "rslave",
        }
        if not privileged:
            linux |= {"maskedPaths": MASKED, "readonlyPaths": READ_ONLY}
            if context.get("seccompProfile", {}).get("type") == "RuntimeDefault":
                linux["seccomp"] = default_seccomp(capabilities)
        words = [*manifest["command"], *manifest.get("args", [])]
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {
                    "uid": user,
                    "gid": context.get("runAsGroup", user),
                    "additionalGids": [context[name] for name in ("fsGroup",) if name in context],
                },
                "args": [word.replace("$(NODE_NAME)", self.name) for word in words],
                "env": [f"{name}={value}" for name, value in self._environment(manifest).items()],
                "cwd": "/",
                "capabilities": {"bounding": capabilities, **held},
                "noNewPrivileges": context.get("allowPrivilegeEscalation") is False,
            },
            "root": {"path": str(self.directory / "root"), "readonly": context.get("readOnlyRootFilesystem", False)},
            "mounts": [*_system(privileged), *volumes],
            "linux": linux,
        }

    def _volumes(self, pod: Pod, manifest: Manifest) -> list[dict[str, Any]]:
        declared = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = [_bind(path, path, "rprivate", "ro") for path in _programs()]
        if manifest["name"] == "server" and self.files:
            mounts.append(_bind(self.directory / "store", STORE, "rprivate", "ro"))
        for each in manifest["volumeMounts"]:
            source = self._source(pod, declared[each["name"]])
            mode = ["ro"] if each.get("readOnly") else []
            mounts.append(_bind(source, each["mountPath"], PROPAGATION[each.get("mountPropagation")], *mode))
        for each in mounts:
            target = self.directory / "root" / each["destination"].lstrip("/")
            if each["destination"] == "/dev/fuse":
                continue  # in a file system of its own
            target.mkdir(parents=True, exist_ok=True)
        return mounts

    def _environment(self, manifest: Manifest) -> dict[str, str]:
        variables = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        for each in manifest.get("envFrom", []):
            found = self.secret(each["secretRef"]["name"])
            variables |= {file.name: file.read_text() for file in sorted(found.glob("*"))}
        for each in manifest.get("env", []):
            match each:
                case {"value": str(value)}:
                    variables[each["name"]] = value
                case {"valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}:
                    variables[each["name"]] = self.name
                case _:
                    raise AssertionError(f"this node has no {each}")
        return variables

    def _source(self, pod: Pod, volume: Manifest) -> Path:
        """Where a volume is on this host, of the group that the pod asks for."""
        group = pod.spec.get("securityContext", {}).get("fsGroup", 0)
        match volume:
            case {"hostPath": {"path": "/dev/fuse"}}:
                return Path("/dev/fuse")
            case {"hostPath": {"path": path}}:
                source = self.host / str(path).lstrip("/")
            case {"configMap": {"name": name}}:
                return self.config_map(name)
            case {"secret": {"secretName": name, "defaultMode": mode}}:
                for file in self.secret(name).iterdir():
                    os.chown(file, 0, group)
                    file.chmod(mode)
                return self.secret(name)
            case {"emptyDir": _, "name": name}:
                source = self.directory / "emptyDir" / pod.name / str(name)
                source.mkdir(parents=True, exist_ok=True)
                os.chown(source, 0, group)
                source.chmod(0o2777)
                return source
            case _:
                raise AssertionError(f"this node has no {volume}")
        source.mkdir(parents=True, exist_ok=True)
        return source

    def publish(self, pod: str, path: str) -> Path:
        """Have the driver publish a directory for a pod, as the kubelet does; where it is. Raises grpc.RpcError."""
        target = _target(pod)
        (self.host / target.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        self._ask_driver("Publish", publication(target, f"csi-{pod}", {"path": path}))
        return self.host / target.lstrip("/")

    def unpublish(self, pod: str) -> None:
        """Have the driver take a pod's directory away. Raises grpc.RpcError."""
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=f"csi-{pod}", target_path=_target(pod))
        self._ask_driver("Unpublish", request)

    def _ask_driver(self, what: str, request: Message) -> None:
        socket = self.host / DRIVER_SOCKET
        wait_until(socket.exists, timeout_s=TIMEOUT_S)
        options = [("grpc.use_local_subchannel_pool", 1)]  # else a channel waits as long as one before to a driver
        with grpc.insecure_channel(f"unix://{socket}", options=options) as channel:
            call = channel.unary_unary(
                f"/csi.v1.Node/Node{what}Volume",
                request_serializer=type(request).SerializeToString,
                response_deserializer=getattr(csi_pb2, f"Node{what}VolumeResponse").FromString,
            )
            call(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)

    def close(self) -> None:
        """End everything; nothing is left mounted."""
        for started in reversed(self.started):
            started.kill()
        subprocess.run(["umount", "--recursive", "--lazy", self.host], check=False, timeout=10)


def _target(pod: str) -> str:
    """Where the kubelet has the volume of a pod."""
    return f"/{PODS}/{pod}/volumes/mount"


def _programs() -> list[Path]:
    """The directories of the host that have Python, trimsfs and all that they need."""
    wanted = {Path("/usr"), ROOT, Path(sys.prefix), Path(sys.base_prefix), *filter(Path.is_dir, map(Path, sys.path))}
    return sorted(path for path in wanted if not any(above in wanted for above in path.parents))


def _bind(source: Path, target: Path | str, *options: str) -> dict[str, Any]:
    return {"destination": str(target), "type": "bind", "source": str(source), "options": ["rbind", *options]}


def _system(privileged: bool) -> list[dict[str, Any]]:
    """The file systems that every container has."""
    sysfs = ["nosuid", "noexec", "nodev", "rw" if privileged else "ro"]
    found = [("/proc", "proc", []), ("/dev", "tmpfs", ["nosuid", "mode=755"]), ("/sys", "sysfs", sysfs)]
    return [{"destination": path, "type": kind, "source": kind, "options": options} for path, kind, options in found]


def _capabilities(context: Manifest) -> set[str]:
    """The capabilities that a security context gives, without CAP_; none that the tests themselves lack."""
    if context.get("privileged"):
        return own_capabilities()
    told = context.get("capabilities", {})
    kept = set() if "ALL" in told.get("drop", []) else {*DEFAULT_CAPABILITIES} - {*told.get("drop", [])}
    return (kept | {*told.get("add", [])}) & own_capabilities()


@functools.cache
def own_capabilities() -> set[str]:
    """The capabilities that this process may give."""
    bounding = re.search(r"^CapBnd:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert bounding is not None
    done = subprocess.run(["capsh", f"--decode={bounding[1]}"], capture_output=True, text=True, check=True, timeout=10)
    return {name.removeprefix("cap_").upper() for name in done.stdout.strip().partition("=")[2].split(",")}


def default_seccomp(capabilities: Iterable[str]) -> dict[str, Any]:
    """The default profile for these capabilities, as OCI has it."""
    profile = json.loads(SECCOMP.read_text())
    held = set(capabilities)

    def applies(rule: dict[str, Any]) -> bool:
        wants, unless = rule.get("includes", {}), rule.get("excludes", {})
        here = "amd64" in wants.get("arches", ["amd64"]) and "amd64" not in unless.get("arches", [])
        return here and held.issuperset(wants.get("caps", [])) and held.isdisjoint(unless.get("caps", []))

    fields = ("names", "action", "args", "errnoRet")
    rules = [{name: rule[name] for name in fields if rule.get(name)} for rule in profile["syscalls"] if applies(rule)]
    architectures = profile["archMap"][0]
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [architectures["architecture"], *architectures["subArchitectures"]],
        "syscalls": rules,
    }


@contextmanager
def a_node(
    directory: Path, files: Mapping[str, bytes], *, name: str = "node-1", name_server: str | None = None
) -> Iterator[Node]:
    """A node with these files in its store; nothing of it is left."""
    node = Node(directory, files, name, name_server)
    node.set_up()
    try:
        yield node
    finally:
        node.close()
