"""The Node service of CSI: publishes and unpublishes volumes, and reports their space and health."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from mountctl.extras.csi import csi_pb2
from mountctl.extras.csi.bind_volume import open_directory
from mountctl.extras.csi.csi_requests import Publication, publication, target_path, volume_id
from mountctl.extras.csi.mount_commands import MountCommands, Space
from mountctl.extras.csi.mounts_directory import MountsDirectory
from mountctl.extras.csi.service_account_tokens import ServiceAccountTokens
from mountctl.extras.csi.status_errors import StatusError, invalid, precondition, shown, unavailable
from mountctl.extras.csi.tenants import check_tenant
from mountctl.linux import mounting
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, Mount, mount_at, trimsfs_at

log = logging.getLogger(__name__)

BIND_TIMEOUT_S = 25.0
"""How long a path lookup may take: a server retries a failing store for 15 s."""
LOCK_TIMEOUT_S = 35.0
LAYERS_LIMIT = 64
"""The most stacked mounts that one call unmounts from a target."""
DELETED = "//deleted"


class NodeService:
    """The calls of the service, each in a thread of its own. All raise StatusError."""

    def __init__(
        self,
        *,
        node_id: str,
        mounts: MountsDirectory,
        children: MountCommands,
        tenants: Path | None,
        tokens: ServiceAccountTokens | None = None,
    ) -> None:
        self._node_id = node_id
        self._mounts = mounts
        self._children = children
        self._tenants = tenants
        self._tokens = tokens
        self._ended = threading.Condition()
        self._busy: set[Path] = set()
        """The targets of calls that run."""

    def node_get_info(self, _: csi_pb2.NodeGetInfoRequest) -> csi_pb2.NodeGetInfoResponse:
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_id)

    def node_get_capabilities(self, _: csi_pb2.NodeGetCapabilitiesRequest) -> csi_pb2.NodeGetCapabilitiesResponse:
        """The service's optional calls: volume statistics and condition."""
        rpc = csi_pb2.NodeServiceCapability.RPC
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[
                csi_pb2.NodeServiceCapability(rpc=rpc(type=rpc.GET_VOLUME_STATS)),
                csi_pb2.NodeServiceCapability(rpc=rpc(type=rpc.VOLUME_CONDITION)),
            ]
        )

    def node_publish_volume(self, request: csi_pb2.NodePublishVolumeRequest) -> csi_pb2.NodePublishVolumeResponse:
        """Bind-mount a directory of a mount at the target; replaces a bind mount whose mount is gone."""
        wanted = publication(request, self._mounts.path)
        name = self._mounts.resolve(wanted.mount, wanted.target)
        check_tenant(self._tenants, wanted.namespace, name, wanted.path)
        # Pods that share a PersistentVolume have one volume, each with a target of its own.
        with self._only_call_for(wanted.target):
            source = self._mounts.find(name)
            there = mount_at(wanted.target)
            published = there is not None and self._is_wanted(there, source, wanted)
            self._check_identity(source, wanted, published=published)
            if published:
                return csi_pb2.NodePublishVolumeResponse()
            self._children.check_answers(source)
            # Only now: names of a service account's path come with its token.
            path = self._version_of(source, wanted.path) or wanted.path
            if path != wanted.path:
                self._check_identity(source, replace(wanted, path=path), published=False)
            made = _make_target(wanted.target) if there is None else False
            try:
                self._bind(source, path, wanted.target, replaces=there is not None)
            except BaseException:
                if made:
                    with suppress(OSError):
                        wanted.target.rmdir()
                raise
        log.info("volume %s: mounted %s at %s", wanted.volume, source.mountpoint / path, wanted.target)
        return csi_pb2.NodePublishVolumeResponse()

    def node_unpublish_volume(self, request: csi_pb2.NodeUnpublishVolumeRequest) -> csi_pb2.NodeUnpublishVolumeResponse:
        """Unmount a volume, even if it is in use or hangs, and remove the target."""
        volume = volume_id(request.volume_id)
        target = target_path(request.target_path, self._mounts.path)
        unmounted = False
        with self._only_call_for(target):
            for _ in range(LAYERS_LIMIT):
                there = mount_at(target)
                if there is None:
                    break
                _check_ours(there)
                try:
                    mounting.unmount(target, lazy=True)
                except OSError as error:
                    raise StatusError(grpc.StatusCode.INTERNAL, f"unmount {target}: {error.strerror}") from None
                unmounted = True
            _remove_target(target)
        if unmounted:
            log.info("volume %s: unmounted from %s", volume, target)
        return csi_pb2.NodeUnpublishVolumeResponse()

    def node_get_volume_stats(self, request: csi_pb2.NodeGetVolumeStatsRequest) -> csi_pb2.NodeGetVolumeStatsResponse:
        """The space of the mount's cache directory, the files that it knows, and whether the volume still works."""
        volume = volume_id(request.volume_id)
        if request.volume_path and not request.volume_path.startswith("/"):
            raise _not_published(volume, request.volume_path)  # as the CSI sanity suite has it
        path = target_path(request.volume_path, self._mounts.path, "volume_path")
        there = trimsfs_at(path)
        if there is None:
            raise _not_published(volume, str(path))
        space, problem = Space(total=0, free=0, files=0), ""
        source = self._mounts.by_device().get(there.device)
        if source is None:
            problem = f"{there.source} was remounted, or is not mounted: restart the containers that use this volume"
        else:
            try:
                space = self._children.check_answers(source)
            except StatusError as error:
                problem = str(error)
        kind = csi_pb2.VolumeUsage
        usage = [
            kind(total=space.total, available=space.free, used=max(0, space.total - space.free), unit=kind.BYTES),
            kind(total=space.files, available=0, used=space.files, unit=kind.INODES),
        ]  # the kubelet takes no answer without usage, also of a volume that does not work
        condition = csi_pb2.VolumeCondition(abnormal=bool(problem), message=problem or "the mount answers")
        return csi_pb2.NodeGetVolumeStatsResponse(usage=usage, volume_condition=condition)

    @contextmanager
    def _only_call_for(self, target: Path) -> Iterator[None]:
        """Wait until no other call for a target runs. Raises StatusError (ABORTED) if one still does in the end."""
        with self._ended:
            if not self._ended.wait_for(lambda: target not in self._busy, LOCK_TIMEOUT_S):
                earlier = f"target {target}: an earlier call for it still runs: try again later"
                raise StatusError(grpc.StatusCode.ABORTED, earlier)
            self._busy.add(target)
        try:
            yield
        finally:
            with self._ended:
                self._busy.remove(target)
                self._ended.notify_all()

    def _check_identity(self, source: Mount, wanted: Publication, *, published: bool) -> None:
        """Check that the pod has the service account that a path belongs to, and keep its token. Raises StatusError."""
        if self._tokens is None or (published and self._tokens.renew(wanted)):
            return
        self._tokens.check(wanted, self._children.options(source))

    def _is_wanted(self, there: Mount, source: Mount, wanted: Publication) -> bool:
        """Whether the requested volume is mounted at the target; False if it may be replaced. Raises StatusError."""
        _check_ours(there)
        # The store may have deleted the directory meanwhile; if it reappears, it is the same one.
        if there.device == source.device:
            published, root = there.root.removesuffix(DELETED), _root(source, wanted.path)
            if published == root:
                return True
            if os.path.dirname(published) == os.path.dirname(root) and self._version_of(source, wanted.path):
                return True  # an alias, which has moved since, or leads to what is published
        if there.device in self._mounts.by_device():
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS,
                f"target_path {wanted.target}: {there.root} of {there.source} is published there: unpublish it first",
            )
        return False

    def _version_of(self, source: Mount, path: str) -> str | None:
        """The path of the version that an alias leads to; None if the path is no alias. Raises StatusError."""
        done = self._run_for_path(source, path, ["readlink", "-n", "--", source.mountpoint / path])
        if done.returncode != 0:
            return None
        if "/" in done.stdout or done.stdout in {".", ".."}:
            raise invalid(f"{_what(source, path)}: leads out of its model")
        return os.path.join(os.path.dirname(path), done.stdout)

    def _run_for_path(self, source: Mount, path: str, command: list[str | Path]) -> "subprocess.CompletedProcess[str]":
        """Run a command about a path of a mount. Raises StatusError (DEADLINE_EXCEEDED)."""
        done = self._children.run(source, command, BIND_TIMEOUT_S)
        if done is None:
            late = f"not found in {BIND_TIMEOUT_S:.0f} s: see the mount's log"
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"{_what(source, path)}: {late}")
        return done

    def _bind(self, source: Mount, path: str, target: Path, *, replaces: bool) -> None:
        order = {
            "mountpoint": str(source.mountpoint),
            "number": source.number,
            "path": path,
            "target": str(target),
            "replace": replaces,
        }
        command: list[str | Path] = [sys.executable, "-P", "-m", "mountctl.extras.csi.bind_volume", json.dumps(order)]
        done, what = self._run_for_path(source, path, command), _what(source, path)
        if done.returncode != 0:
            log.error("bind_volume failed: %s", done.stderr)
            raise StatusError(grpc.StatusCode.INTERNAL, f"{what}: bind_volume ended with status {done.returncode}")
        answer: dict[str, Any] = json.loads(done.stdout)
        if answer:
            raise _refusal(answer["stage"], answer["errno"], what, target)


def _what(source: Mount, path: str) -> str:
    return f"path {shown(path)} of {source.mountpoint}"


def _not_published(volume: str, path: str) -> StatusError:
    return StatusError(grpc.StatusCode.NOT_FOUND, f"volume {volume}: is not published at {shown(path)}")


def _root(source: Mount, path: str) -> str:
    """The root that a bind mount of a path has in the kernel's mount table."""
    return "/" + "/".join(part for part in (source.root.strip("/"), path) if part)


def _check_ours(there: Mount) -> None:
    """Raises StatusError for a mount of another file system type."""
    if there.kind != FILE_SYSTEM_TYPE:
        raise precondition(f"target_path {there.mountpoint}: a {there.kind} file system is mounted there: unmount it")


def _make_target(target: Path) -> bool:
    """Create the target, or check that it is an empty directory; returns whether it created it. Raises StatusError."""
    try:
        parent = open_directory(target.parent)
    except OSError as error:
        raise _bad_target(target, error) from None
    try:
        try:
            os.mkdir(target.name, 0o750, dir_fd=parent)
        except FileExistsError:
            if _holds_something(parent, target.name):
                raise precondition(f"target_path {target}: is not empty: a volume would hide its files") from None
            return False
    except OSError as error:
        raise _bad_target(target, error) from None
    finally:
        os.close(parent)
    return True


def _holds_something(parent: int, name: str) -> bool:
    """Whether a directory, not a symbolic link, has entries. Raises OSError."""
    directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        return bool(os.listdir(directory))
    finally:
        os.close(directory)


def _remove_target(target: Path) -> None:
    """Remove a volume's target directory if it exists. Raises StatusError."""
    try:
        parent = open_directory(target.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _bad_target(target, error) from None
    try:
        with suppress(FileNotFoundError):
            os.rmdir(target.name, dir_fd=parent)
    except OSError as error:
        raise _bad_target(target, error) from None
    finally:
        os.close(parent)


def _bad_target(target: Path, error: OSError) -> StatusError:
    match error.errno:
        case errno.ELOOP:
            return invalid(f"target_path {target}: leads through a symbolic link: give the directory's own path")
        case errno.ENOENT:
            return precondition(f"target_path {target}: {target.parent} does not exist: create it")
        case errno.ENOTDIR:
            return precondition(f"target_path {target}: is not a directory")
        case _:
            return precondition(f"target_path {target}: {error.strerror}")


def _refusal(stage: str, number: int, what: str, target: Path) -> StatusError:
    """The error for a bind mount that failed."""
    cause = os.strerror(number)
    match stage, number:
        case "path", errno.ENOENT:
            return StatusError(grpc.StatusCode.NOT_FOUND, f"{what}: does not exist: see `trimsfs ls`")
        case "path", errno.ENOTDIR:
            return invalid(f"{what}: is a file: give its directory")
        case "path", errno.ELOOP | errno.EXDEV:
            return invalid(f"{what}: leads out of the mount")
        case "mount", 0:
            return unavailable(f"{what}: was remounted just now: try again")
        case (("mount" | "path"), _):
            return unavailable(f"{what}: {cause}: see the mount's log")
        case _, errno.EPERM:
            return precondition(f"{what}: {cause}: the driver lacks CAP_SYS_ADMIN: run it privileged")
        case _, errno.ENOSYS:
            return precondition(f"{what}: {cause}: the driver needs Linux 5.12 or newer")
        case _:
            return StatusError(grpc.StatusCode.INTERNAL, f"target_path {target}: {cause}")
