"""What a program may ask for, as the name of a control file: ``DEVICE[.ipc][@PATTERN]``."""

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
    """How a copy is lent: by a descriptor, to be mapped for reading, or by a handle of 64 bytes, also for writing."""

    VMM = "vmm"
    IPC = "ipc"


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """A copy on a device, by its UUID, of the tensors whose names match a pattern, None for all of the file."""

    device: str
    memory: MemoryKind = MemoryKind.VMM
    pattern: str | None = None


def parse_request(name: str) -> CopyRequest | None:
    """What the name of a control file asks for; None when it is no such name.

    ``MIG`` is what `nvidia-smi` calls a part of a device; the driver makes no difference.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    pattern = unquote(match[3]) if match[3] is not None else None
    return CopyRequest(
        f"GPU-{match[1]}", MemoryKind.IPC if match[2] else MemoryKind.VMM, None if pattern == "*" else pattern
    )


@dataclass(frozen=True, slots=True)
class WarmRequest:
    """What a command is to load, and for which user, None for who gives the command."""

    request: CopyRequest
    uid: int | None


def parse_warm_command(name: str) -> WarmRequest | None:
    """What the name of a command ``warm-[UID~]DEVICE...`` is to load; None when it is no such name."""
    match = _WARM.fullmatch(name)
    asked = parse_request(match[2]) if match else None
    return WarmRequest(asked, int(match[1]) if match[1] else None) if match and asked else None


def device_of_attribute(name: str) -> str | None:
    """The device that such an attribute is about; None for another attribute."""
    match = _ATTRIBUTE.fullmatch(name)
    return match[1] if match else None


def matching(tensors: Iterable[Tensor], pattern: str | None) -> list[Tensor]:
    """The tensors whose names match a pattern, of a file in which that makes sense."""
    return [tensor for tensor in tensors if pattern is None or fnmatch.fnmatchcase(tensor.name, pattern)]
