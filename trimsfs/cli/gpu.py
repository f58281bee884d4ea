"""The GPUs of a mount on the command line: names in commands, and the lines of `trimsfs status`."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from trimsfs.cli.control_client import read_json, translated
from trimsfs.control.metrics import labelled
from trimsfs.errors import ConfigurationError, DeviceError, NoSuchEntryError
from trimsfs.mountinfo import mount_of

SEARCH_TIMEOUT_S = 30.0
"""How long a server may take to find its devices after its start."""
_SEARCH_INTERVAL_S = 0.1
VERIFY_GPU = "verify-gpu"
_WARM = "warm-"
_IPC = ".ipc"
_METRICS = "trimsfs_gpu_device_"

Naming = Callable[[Path], str]
"""Returns the name of the command to give in a control directory."""


def warming(to: str, uid: int | None) -> Naming:
    """The naming of the command that loads models to the tier *to*, for the user *uid*. Raises ConfigurationError.

    The name depends on the mount's devices, so each control directory needs its own.
    """
    if to in {"disk", "host"}:
        if uid is not None:
            raise ConfigurationError(f"option --for-uid {uid}: only copies on GPUs belong to a user: add --to gpu")
        return lambda _: f"{_WARM}{to}"
    whole = to.removesuffix(_IPC)
    tier, colon, device = whole.partition(":")
    if tier != "gpu" or bool(colon) != bool(device):
        raise ConfigurationError(f"option --to {to}: must be disk, host, gpu, gpu:UUID or gpu:UUID.ipc")
    user = "" if uid is None else f"{uid}~"
    return lambda directory: f"{_WARM}{user}{_chosen(directory, device)}{to[len(whole) :]}"


def verifying(directory: Path) -> str:
    """The name of the command that compares GPU copies with files. Raises DeviceError on a mount without a GPU."""
    _wait_for_devices(directory)
    return VERIFY_GPU


def devices(directory: Path) -> list[str]:
    """The devices of a mount, read from a control directory: works even if only a part of the mount is visible."""
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise translated(error, directory) from error
    return sorted(name.removeprefix(_WARM) for name in names if name.startswith(f"{_WARM}GPU-"))


def _chosen(directory: Path, device: str) -> str:
    """The given device or, without one, the only device. Raises DeviceError, ConfigurationError."""
    uuids = _wait_for_devices(directory)
    listed = ", ".join(uuids)
    if device and device not in uuids:
        raise DeviceError(f"no device {device}: this mount has {listed}")
    if not device and len(uuids) > 1:
        raise ConfigurationError(f"option --to gpu: this mount has several devices: use --to gpu:UUID, one of {listed}")
    facts = _facts(directory)
    if facts is not None and facts.get("options", {}).get("gpu_sharing") == "none":
        raise ConfigurationError(f"{facts['mountpoint']} is mounted with gpu_sharing none: no copy can be preloaded")
    return device or uuids[0]


def _wait_for_devices(directory: Path) -> list[str]:
    """Wait until the server has searched for devices. Raises DeviceError when there is none."""
    deadline = time.monotonic() + SEARCH_TIMEOUT_S
    while not (uuids := devices(directory)):
        facts = _facts(directory)
        if facts is None:
            raise DeviceError(f"{directory}: the mount has no GPU: `trimsfs status` on the host says why")
        reason = facts["gpu"]["unavailable"] if "gpu" in facts else "its server has no GPU tier"
        if reason is not None or time.monotonic() > deadline:
            raise DeviceError(f"{facts['mountpoint']} uses no GPU: {reason or 'its server is still searching'}")
        time.sleep(_SEARCH_INTERVAL_S)
    return uuids


def _facts(directory: Path) -> dict[str, Any] | None:
    """The facts of the server; None where only a part of the mount is visible, as in a container."""
    mount = mount_of(directory)
    try:
        return read_json(mount.mountpoint / ".trims/control") if mount is not None else None
    except NoSuchEntryError:
        return None


def add_details(gpu: dict[str, Any], metrics: str, mountpoint: Path, *, copies: bool) -> None:
    """Add the metrics of each device to the facts on GPUs and, with *copies*, the copies on it."""
    if copies and gpu["devices"]:
        gpu["devices"] = read_json(mountpoint / ".trims/gpu")["devices"]
    counts = labelled(metrics, "device")
    for device in gpu["devices"]:
        device["metrics"] = counts.get(device["uuid"], {})


def has_failed(gpu: dict[str, Any] | None) -> bool:
    """Whether a GPU has failed, according to the facts on GPUs."""
    return gpu is not None and any(device["failure"] is not None for device in gpu["devices"])


def lines(gpu: dict[str, Any]) -> Iterator[str]:
    """The facts on GPUs as lines for people: one for each device, and for each copy and lease on it."""
    if not gpu["devices"]:
        yield f"none: {gpu['unavailable'] or 'the server is still searching'}"
    for device in gpu["devices"]:
        yield _device(device)
        copies = device.get("copies", ())
        contents = Counter(path for path, _ in {(copy["path"], copy["generation"]) for copy in copies})
        for copy in copies:
            # A file that has been replaced may have copies of both generations.
            which = f" ({copy['generation'][:8]})" if contents[copy["path"]] > 1 else ""
            yield f"  {_copy(copy, which)}"
            yield from (f"    {_lease(lease)}" for lease in copy["leases"])
            hidden = copy["leased"] - len(copy["leases"])
            if hidden:
                yield f"    {counted(hidden, 'lease')} of others"


def _device(device: dict[str, Any]) -> str:
    name = f"{device['uuid']} ({device['name']})"
    if device["failure"] is not None:
        return f"{name}: failed: {device['failure']}"

    def number(metric: str) -> float:
        return float(device["metrics"].get(_METRICS + metric, 0))

    seconds = number("load_seconds_total")
    rate = f" at {decimal(int(number('loaded_bytes_total') / seconds))}/s" if seconds else ""
    return (
        f"{name}: {decimal(device['used_bytes'])} of {decimal(device['budget_bytes'])} "
        f"(of {decimal(device['total_bytes'])}), "
        f"{counted(number('copies'), 'copy')}, {counted(number('leases'), 'lease')}, "
        f"{counted(number('hits_total'), 'hit')}, {counted(number('loads_total'), 'load')}{rate}, "
        f"{counted(number('evictions_total'), 'eviction')}"
    )


def counted(number: float, noun: str) -> str:
    """A number and a noun, in the plural where needed."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:.0f} {noun if number == 1 else plural}"


def _copy(copy: dict[str, Any], which: str) -> str:
    part = f", tensors {copy['tensors']}" if copy["tensors"] is not None else ""
    return (
        f"/{copy['path']}{which}{part}: {decimal(copy['bytes'])}, {copy['state']}, leased by {copy['memory']} "
        f"to {copy['domain']}, {counted(copy['uses'], 'use')}"
    )


def _lease(lease: dict[str, Any]) -> str:
    # A process of another PID namespace has no pid here.
    pid = f", pid {lease['pid']}" if lease["pid"] else ""
    container = f", container {lease['container']}" if lease["container"] else ""
    return f"uid {lease['uid']}{pid}{container}, since {datetime.fromtimestamp(lease['since']):%Y-%m-%d %H:%M:%S}"
