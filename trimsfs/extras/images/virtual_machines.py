"""The options that give an image and its devices to a guest, for each virtual machine monitor. All are read-only."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

Memory = tuple[Path, int]
"""A file whose first bytes, so many, a guest gets as persistent memory."""
MOST_DEVICES = 96
"""What fits beside the image into the slots that QEMU's options name."""
_FIRST_SLOT, _FUNCTIONS = 0x10, 8


def qemu(memories: Sequence[Memory]) -> str:
    """Options of QEMU, one in a line. A guest finds devices in the order of their slots."""
    lines = []
    for number, (path, size) in enumerate(memories):
        slot, function = divmod(number, _FUNCTIONS)
        backend = f"memory-backend-file,id=trimsfs{number},share=on,readonly=on,size={size},mem-path="
        lines += [
            f"-object {shlex.quote(backend + str(path).replace(',', ',,'))}",
            f"-device virtio-pmem-pci,memdev=trimsfs{number},addr={_FIRST_SLOT + slot:#x}.{function},multifunction=on",
        ]
    return "\n".join(lines)


def firecracker(memories: Sequence[Memory]) -> str:
    """The part ``pmem`` of a configuration file of Firecracker, as JSON."""
    devices = [
        {"id": f"trimsfs{number}", "path_on_host": str(path), "root_device": False, "read_only": True}
        for number, (path, _) in enumerate(memories)
    ]
    return json.dumps({"pmem": devices}, indent=2)


def cloud_hypervisor(memories: Sequence[Memory]) -> str:
    """Options of Cloud Hypervisor, one in a line."""
    places = [shlex.quote(f"file={path},size={size},discard_writes=on") for path, size in memories]
    return "\n".join(["--pmem", *places])


OPTIONS: dict[str, Callable[[Sequence[Memory]], str]] = {
    "qemu": qemu,
    "firecracker": firecracker,
    "cloud-hypervisor": cloud_hypervisor,
}


def mount_command(devices: int) -> str:
    """What mounts the image in a guest that has no other persistent memory."""
    options = ["ro", "dax=always", *(f"device=/dev/pmem{number + 1}" for number in range(devices))]
    return f"mount -t erofs -o {','.join(options)} /dev/pmem0 /models"
