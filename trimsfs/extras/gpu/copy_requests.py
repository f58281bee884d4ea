"""Parses programs' requests: names of control files ``DEVICE[.ipc][@PATTERN]``, of warm commands and of attributes."""

import enum
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from trimsfs.formats.table import Tensor

_NAME = re.compile(r"(?:GPU|MIG)-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(\.ipc)?(?:@(.+))?", re.DOTALL)
_WARM = re.compile(r"warm-(?:([0-9]{1,10})~)?((?:GPU|MIG)-.+)", re.DOTALL)
_ATTRIBUTE = re.compile(r"gpu\.(GPU-[0-9a-f-]{36})\.ipc_handle")


class MemoryKind(enum.StrEnum):
    """How copies are shared: by descriptor, mapped read-only (vmm), or by CUDA IPC handle, writable (ipc)."""

    VMM = "vmm"
    IPC = "ipc"


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A request for the tensors whose names match *pattern*, or for the whole file, on the device of this UUID."""

    device: str
    memory: MemoryKind = MemoryKind.VMM
    pattern: str | None = None


def parse_request(name: str) -> CopyRequest | None:
    """The request in a control file's name; None for another name.

    `nvidia-smi` writes ``MIG-`` for a part of a device; the driver uses ``GPU-`` for both.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    pattern = unquote(match[3]) if match[3] is not None else None
    return CopyRequest(
        f"GPU-{match[1]}", MemoryKind.IPC if match[2] else MemoryKind.VMM, None if pattern == "*" else pattern
    )


def parse_warm_command(name: str) -> tuple[CopyRequest, int | None] | None:
    """The request in a command's name ``warm-[UID~]DEVICE...``, and the user's id; None for another name.

    Without a user's id, the copy is for the user who gives the command.
    """
    match = _WARM.fullmatch(name)
    request = parse_request(match[2]) if match else None
    return (request, int(match[1]) if match[1] else None) if match and request else None


def device_of_attribute(name: str) -> str | None:
    """The device in an attribute's name ``gpu.UUID.ipc_handle``; None for another attribute."""
    match = _ATTRIBUTE.fullmatch(name)
    return match[1] if match else None


def matching(tensors: Iterable[Tensor], pattern: str | None) -> list[Tensor]:
    """The tensors whose names match a pattern; all of them for None."""
    return [tensor for tensor in tensors if pattern is None or fnmatch.fnmatchcase(tensor.name, pattern)]
