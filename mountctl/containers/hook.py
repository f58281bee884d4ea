"""The OCI hook: reads a container's state from the runtime, and the models that its annotations request."""

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from mountctl.containers.attachment import CONTROL, BindSource, Target
from mountctl.containers.mountpoints import gpu_socket
from mountctl.linux.sockets import gpu_path
from trimsfs.errors import ConfigurationError, NoAnswerError, NoSuchEntryError, TrimsError
from trimsfs.polling import readable

MODELS = "dev.trimsfs.models"
MOUNT = "dev.trimsfs.mount"
GPU = "dev.trimsfs.gpu"
STATE_LIMIT = 1 << 20
CONFIGURATION_LIMIT = 16 << 20
MODELS_LIMIT = 256
STATE_TIMEOUT_S = 10.0


class State(NamedTuple):
    """A container that is being created, and its annotations for trimsfs."""

    pid: int
    bundle: Path
    annotations: dict[str, str]


def read_state(descriptor: int) -> State:
    """Read the state of a container from the runtime. Raises TrimsError."""
    text = bytearray()
    deadline = time.monotonic() + STATE_TIMEOUT_S
    while True:
        if not readable([descriptor], deadline - time.monotonic()):
            raise NoAnswerError(f"the runtime sent no container state in {STATE_TIMEOUT_S:.0f} s")
        part = os.read(descriptor, 1 << 16)
        if not part:
            return parse_state(bytes(text))
        text += part
        if len(text) > STATE_LIMIT:
            raise ConfigurationError(f"the container's state has more than {STATE_LIMIT} bytes")


def parse_state(text: bytes) -> State:
    """Parse and check the state of a container. Raises ConfigurationError."""
    state = _parse(text, "the container's state")
    pid, bundle, annotations = state.get("pid"), state.get("bundle"), state.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise ConfigurationError("the container's state: annotations are not a JSON object")
    ours = {name: annotations[name] for name in (MODELS, MOUNT, GPU) if name in annotations}
    for name, value in ours.items():
        if not _is_text(value):
            raise ConfigurationError(f"annotation {name}: not a UTF-8 string without NUL")
    if not _is_text(bundle) or not bundle.startswith("/"):
        raise ConfigurationError("the container's state: bundle is not an absolute path")
    if state.get("status") not in ("creating", "created"):  # a tuple, as the value may be unhashable
        raise ConfigurationError(
            f"the container is {str(state.get('status'))[:20]!r}: configure the hook for stage createRuntime"
        )
    if not isinstance(pid, int) or isinstance(pid, bool) or not 1 < pid < 1 << 31:
        raise ConfigurationError(
            "the container's state: pid is not a process: configure the hook for stage createRuntime"
        )
    return State(pid, Path(bundle), ours)


def root_of(bundle: Path) -> str:
    """The root directory of a bundle's container, as the host sees it. Raises TrimsError."""
    path = bundle / "config.json"
    try:
        with path.open("rb") as file:
            text = file.read(CONFIGURATION_LIMIT + 1)
    except OSError as error:
        raise TrimsError(f"{path}: {error.strerror}") from None
    if len(text) > CONFIGURATION_LIMIT:
        raise ConfigurationError(f"{path}: more than {CONFIGURATION_LIMIT} bytes")
    root = _parse(text, str(path)).get("root")
    name = root.get("path") if isinstance(root, dict) else None
    if not _is_text(name) or not name:
        raise ConfigurationError(f"{path}: no root.path")
    return str(bundle / name)


def parse_models(text: str) -> list[tuple[str, str | None]]:
    """The models of an annotation ``resnet50,bert=/opt/bert``, each with its path in the container or None.

    Raises ConfigurationError.
    """
    models = []
    for item in text.split(","):
        name, separator, target = item.strip().partition("=")
        parts = name.split("/")
        if {"", ".", "..", CONTROL} & set(parts):
            raise ConfigurationError(f"annotation {MODELS}: {name[:80]!r} is not a model: give its path in the mount")
        if separator and not target.startswith("/"):
            raise ConfigurationError(f"annotation {MODELS}: {target[:80]!r} is not an absolute path in the container")
        models.append((name, target if separator else None))
    if len(models) > MODELS_LIMIT:
        raise ConfigurationError(f"annotation {MODELS}: more than {MODELS_LIMIT} models")
    return models


def asks(annotations: dict[str, str]) -> bool:
    """Whether a container requests a model or GPU copies. Raises ConfigurationError."""
    return MODELS in annotations or _asks_for_gpu(annotations)


def attachments(state: State, mountpoint: Path) -> list[tuple[BindSource, Target]]:
    """The bind mounts that a container requests. Raises TrimsError."""
    wanted = state.annotations.get(MODELS)
    models = [] if wanted is None else parse_models(wanted)
    root = root_of(state.bundle)
    binds = [
        (BindSource(name, str(mountpoint)), Target(state.pid, path or str(mountpoint / name), root))
        for name, path in models
    ]
    if _asks_for_gpu(state.annotations):
        if gpu_socket(mountpoint) is None:
            raise NoSuchEntryError(
                f"annotation {GPU}: {mountpoint} has no GPU: `trimsfs status {mountpoint}` says why; or leave it out"
            )
        socket = str(gpu_path(mountpoint))
        binds.append((BindSource(socket), Target(state.pid, socket, root)))
    return binds


def _asks_for_gpu(annotations: dict[str, str]) -> bool:
    """Whether a container requests the socket of GPU clients. Raises ConfigurationError."""
    value = annotations.get(GPU, "false")
    if value not in {"true", "false"}:
        raise ConfigurationError(f"annotation {GPU}: {value[:20]!r}: give true or false")
    return value == "true"


def _is_text(value: object) -> TypeGuard[str]:
    """Whether a value can be a path: a UTF-8 string without NUL."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _parse(text: bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigurationError(f"{what}: not a JSON object")
    return parsed
