"""Parses and checks requests, before the driver touches any path. All functions raise StatusError."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mountctl.extras.csi import csi_pb2
from mountctl.extras.csi.status_errors import SHOWN_LENGTH, invalid, precondition, shown
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, mount_of

RESERVED = "csi.storage.k8s.io/"
EPHEMERAL = f"{RESERVED}ephemeral"
NAMESPACE = f"{RESERVED}pod.namespace"
POD = f"{RESERVED}pod.name"
SERVICE_ACCOUNT = f"{RESERVED}serviceAccount.name"
TOKENS = f"{RESERVED}serviceAccount.tokens"
CONTROL_DIRECTORY = ".trims"

VOLUME_ID_LIMIT = 128
"""Bytes; the specification's limit for names."""
MOUNT_NAME_LIMIT = 128
KEY_LIMIT = 1024
"""Bytes of an S3 key, the longest path that a mount can have."""
NAME_LIMIT = 255
PATH_LIMIT = 4095

_MOUNT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FILE_SYSTEM_TYPES = {"", "trimsfs", FILE_SYSTEM_TYPE}
_MOUNT_FLAGS = {"ro", "nosuid", "nodev"}
"""The flags that every volume has in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A volume to publish at ``target``: ``path`` ("": all) of the mount named ``mount`` (None: the only one).

    ``namespace`` and ``service_account`` are the pod's, and ``tokens`` the account's, in JSON; None where the request
    does not tell.
    """

    volume: str
    target: Path
    mount: str | None
    path: str
    namespace: str | None
    service_account: str | None
    tokens: str | None = field(repr=False)


def subject(request: Any) -> str:
    """The volume of any request and its pod, for a line of the log; "" if the request has none."""
    volume, context = getattr(request, "volume_id", ""), getattr(request, "volume_context", {})
    pod = "/".join(context[name] for name in (NAMESPACE, POD) if context.get(name))
    about = [f"volume {volume}" if volume else "", f"pod {pod}" if pod else ""]
    return "".join(f": {each[:SHOWN_LENGTH]}" for each in about if each)


def publication(request: csi_pb2.NodePublishVolumeRequest, mounts_dir: Path) -> Publication:
    volume = volume_id(request.volume_id)
    target = target_path(request.target_path, mounts_dir)
    context = dict(request.volume_context)
    _check_capability(request, inline=context.get(EPHEMERAL) == "true")
    unknown = {name for name in context if not name.startswith(RESERVED)} - {"mount", "path"}
    if unknown:
        raise invalid(f"volumeAttributes: unknown {shown(min(unknown))}: give only mount and path")
    return Publication(
        volume=volume,
        target=target,
        mount=mount_name(context["mount"]) if "mount" in context else None,
        path=model_path(context.get("path", ""), "volumeAttributes: path"),
        namespace=context.get(NAMESPACE) or None,
        service_account=context.get(SERVICE_ACCOUNT) or None,
        tokens=_tokens(request),
    )


def _tokens(request: csi_pb2.NodePublishVolumeRequest) -> str | None:
    """The service account's tokens. The kubelet gives them once; who makes a volume could, too."""
    tokens = [fields[TOKENS] for fields in (request.volume_context, request.secrets) if fields.get(TOKENS)]
    if len(tokens) > 1:
        raise invalid(f"{TOKENS}: is given twice: leave it out of volumeAttributes and secrets")
    return tokens[0] if tokens else None


def volume_id(text: str) -> str:
    if not text:
        raise invalid("volume_id: is missing")
    if len(text.encode()) > VOLUME_ID_LIMIT or _CONTROL_CHARACTER.search(text):
        raise invalid(
            f"volume_id {shown(text)}: must be {VOLUME_ID_LIMIT} bytes at most and without control characters"
        )
    return text


def target_path(text: str, mounts_dir: Path, field: str = "target_path") -> Path:
    """The target of a volume. This must not touch it: it may lie on a mount that hangs."""
    if not text:
        raise invalid(f"{field}: is missing")
    if len(text.encode()) > PATH_LIMIT:
        raise invalid(f"{field} {shown(text)}: is longer than {PATH_LIMIT} bytes")
    parts = text.rstrip("/").split("/")
    if parts[0] or len(parts) < 3 or not _plain(parts[1:]):
        raise invalid(f"{field} {shown(text)}: must be an absolute path below a directory, without '.', '..' and '//'")
    path = Path("/", *parts)
    if path.is_relative_to(mounts_dir) or mounts_dir.is_relative_to(path):
        raise invalid(f"{field} {shown(text)}: overlaps {mounts_dir}, which holds the mounts themselves")
    if mount_of(path.parent) is not None:
        raise invalid(f"{field} {shown(text)}: lies on a trimsfs mount")
    return path


def mount_name(text: str) -> str:
    """The name of a mount in the mounts directory."""
    if len(text) > MOUNT_NAME_LIMIT or not _MOUNT_NAME.fullmatch(text):
        raise invalid(f"volumeAttributes: mount {shown(text)}: must be a name of letters, digits, '-', '_' and '.'")
    return text


def model_path(text: str, field: str) -> str:
    """A path in a mount, as the store names it; "" is the whole mount."""
    if not text:
        return ""
    if len(text.encode()) > KEY_LIMIT:
        raise invalid(f"{field} {shown(text)}: is longer than {KEY_LIMIT} bytes")
    parts = text.split("/")
    if not _plain(parts):
        raise invalid(f"{field} {shown(text)}: must be a relative path without '.', '..', '//' and '/' at either end")
    if CONTROL_DIRECTORY in parts:
        raise invalid(f"{field} {shown(text)}: {CONTROL_DIRECTORY} is not a model: give the directory above it")
    return text


def _plain(names: Iterable[str]) -> bool:
    """Whether all names can be names of directory entries."""
    return all(
        name not in {"", ".", ".."} and len(name.encode()) <= NAME_LIMIT and not _CONTROL_CHARACTER.search(name)
        for name in names
    )


def _check_capability(request: csi_pb2.NodePublishVolumeRequest, *, inline: bool) -> None:
    if not request.HasField("volume_capability"):
        raise invalid("volume_capability: is missing")
    capability = request.volume_capability
    match capability.WhichOneof("access_type"):
        case None:
            raise invalid("volume_capability: access_type is missing")
        case "block":
            raise precondition("volume_capability: there are no block volumes: use volumeMounts, not volumeDevices")
    _check_access_mode(capability.access_mode.mode, inline=inline)
    mount = capability.mount
    if mount.fs_type not in _FILE_SYSTEM_TYPES:
        raise precondition(f"volume_capability: fs_type {shown(mount.fs_type)}: leave it out")
    for flag in mount.mount_flags:
        if flag not in _MOUNT_FLAGS:
            raise precondition(
                f"volume_capability: mount flag {shown(flag)}: volumes are {', '.join(sorted(_MOUNT_FLAGS))}"
            )
    if mount.volume_mount_group:
        raise precondition(
            "volume_capability: volume_mount_group: the mount sets owner and group: see trimsfs mount --gid"
        )


def _check_access_mode(mode: csi_pb2.VolumeCapability.AccessMode.Mode, *, inline: bool) -> None:
    """Kubernetes gives inline volumes, which cannot say otherwise, the mode SINGLE_NODE_WRITER."""
    modes = csi_pb2.VolumeCapability.AccessMode
    if mode == modes.UNKNOWN:
        raise invalid("volume_capability: access_mode is missing")
    allowed = {modes.SINGLE_NODE_READER_ONLY, modes.MULTI_NODE_READER_ONLY}
    if inline:
        allowed |= {modes.SINGLE_NODE_WRITER}
    if mode not in allowed:
        name = modes.Mode.Name(mode) if mode in modes.Mode.values() else mode
        raise precondition(
            f"volume_capability: access_mode {name}: volumes are read-only: set accessModes: [ReadOnlyMany] in the "
            "PersistentVolume and its claim; for an inline volume, podInfoOnMount in the CSIDriver"
        )
