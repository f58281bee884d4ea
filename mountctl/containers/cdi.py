"""Writes models as devices of the Container Device Interface, which podman, docker, containerd and cri-o mount by name.

A model's name comes from a store and may hold any byte that a file name can; the specs are valid for all of them.
"""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mountctl.containers.forked_work import OverdueError, RefusalError, run_in_child
from mountctl.containers.mountpoints import holds_mountpoints_only, is_shared
from mountctl.linux.cdi_specs import DEFAULT_DIRECTORY, GPU, NAME_LIMIT, WHOLE, device_name, short_hash
from trimsfs.errors import ConfigurationError, NoAnswerError, NotPermittedError, TrimsError

VERSION = "0.5.0"
"""The oldest version with all fields that the specs use, so that older engines read them too."""
VENDOR = "trimsfs.dev"
MODEL_LIMIT = 10_000
SPEC_LIMIT = 64 << 20
_BIND = ("ro", "nosuid", "nodev", "rbind")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The model directories of a mount by their paths in it, and how many have names that are not UTF-8."""

    models: tuple[str, ...]
    unnameable: int


def list_models(mountpoint: Path, depth: int, timeout_s: float) -> Listing:
    """The directories of a mount, down to *depth* levels. Raises TrimsError."""
    root = os.fsencode(mountpoint)

    def work() -> bytes:
        paths: list[bytes] = []
        level = [b""]
        for _ in range(depth):
            level = [below for above in level for below in _directories(root, above)]
            paths += level
            if len(paths) > MODEL_LIMIT:
                raise RefusalError("many")
        return b"\0".join(paths)

    try:
        names = run_in_child(work, timeout_s).split(b"\0")
    except OverdueError:
        raise NoAnswerError(f"{mountpoint}: no answer in {timeout_s:g} s: see `trimsfs status`") from None
    except RefusalError as refusal:
        if refusal.step == "many":
            raise ConfigurationError(f"{mountpoint}: more than {MODEL_LIMIT} directories: lower --depth") from None
        raise TrimsError(f"{mountpoint}: {os.strerror(refusal.number)}") from None
    models = []
    for name in filter(None, names):
        try:
            models.append(name.decode())
        except UnicodeDecodeError:  # JSON cannot hold it
            continue
    return Listing(models=tuple(sorted(models)), unnameable=sum(map(bool, names)) - len(models))


def _directories(root: bytes, above: bytes) -> list[bytes]:
    with os.scandir(os.path.join(root, above)) as entries:
        return [os.path.join(above, entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]


def spec_of(
    mountpoint: Path, models: Iterable[str], kind_class: str = "models", *, gpu_socket: Path | None = None
) -> tuple[dict[str, Any], bool]:
    """The spec of a mount's devices, and whether device `all` follows a remount.

    *gpu_socket* is a separate device: engines start no container whose device is gone. Raises ConfigurationError.
    """
    if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?", kind_class):
        raise ConfigurationError(f"--class {kind_class}: give letters, digits, - and _, with a letter first")
    try:
        str(mountpoint).encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{mountpoint!r}: not UTF-8, which CDI needs: mount it elsewhere") from None
    models = list(models)
    parent = mountpoint.parent
    follows = parent != Path("/") and is_shared(parent) and holds_mountpoints_only(parent)
    whole = _bind(parent, "rslave") if follows else _bind(mountpoint, "rprivate")
    devices = [{"name": WHOLE, "containerEdits": {"mounts": [whole]}}]
    for model, variable in zip(models, _variables(models), strict=True):
        path = mountpoint / model
        edits = {"env": [f"{variable}={path}"], "mounts": [_bind(path, "rprivate")]}
        devices.append({"name": device_name(model), "containerEdits": edits})
    if gpu_socket is not None:
        devices.append({"name": GPU, "containerEdits": {"mounts": [_bind(gpu_socket, "rprivate")]}})
    spec = {
        "cdiVersion": VERSION,
        "kind": f"{VENDOR}/{kind_class}",
        "containerEdits": {"env": [f"TRIMSFS_MODELS={mountpoint}"]},
        "devices": devices,
    }
    return spec, follows


def _variables(models: list[str]) -> list[str]:
    """The name of each model's environment variable; a hash distinguishes names that would be equal."""
    plain = ["TRIMSFS_MODEL_" + (re.sub(r"[^A-Z0-9]+", "_", model.upper())[:NAME_LIMIT].strip("_")) for model in models]
    number = Counter(plain)
    return [
        name if number[name] == 1 and not name.endswith("_") else f"{name.rstrip('_')}_{short_hash(model, 32).upper()}"
        for name, model in zip(plain, models, strict=True)
    ]


def _bind(path: Path, propagation: str) -> dict[str, Any]:
    return {
        "hostPath": str(path),
        "containerPath": str(path),
        "type": "bind",
        "options": [*_BIND, propagation],
    }


def write(spec: dict[str, Any], output: Path) -> None:
    """Write a spec atomically. Raises TrimsError."""
    if output.exists() and not output.is_file():  # a device, such as /dev/null, would become a plain file
        raise ConfigurationError(f"{output}: it is no regular file: name another --output")
    directory = output.parent
    try:
        if directory == DEFAULT_DIRECTORY:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        _check_alone(spec, output)
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".new", dir=directory)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(spec, file, indent=1)
                file.write("\n")
                os.fchmod(file.fileno(), 0o644)
            os.replace(temporary, output)
        except BaseException:
            os.unlink(temporary)
            raise
    except PermissionError as error:
        raise NotPermittedError(f"{output}: {error.strerror}: be root, or name another --output") from None
    except OSError as error:
        raise TrimsError(f"{output}: {error.strerror}") from None


def _check_alone(spec: dict[str, Any], output: Path) -> None:
    """Check that no other spec has these devices: engines refuse a device in two specs. Raises ConfigurationError."""
    names = {device["name"] for device in spec["devices"]}
    for other in output.parent.glob("*.json"):
        if other.name == output.name or other.stat().st_size > SPEC_LIMIT:
            continue
        try:
            document = json.loads(other.read_text())
            taken = {device["name"] for device in document["devices"]} if document["kind"] == spec["kind"] else set()
        except (ValueError, LookupError, TypeError):
            continue
        if names & taken:
            raise ConfigurationError(
                f"{other} has devices of the same names: remove it if its mount is gone, or choose another --class"
            )
