"""Serves GPU copies to programs by control files, attributes and ioctls, and facts about them to operators."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

from trimsfs.errors import StaleHandleError
from trimsfs.extras.gpu.copies import GpuCopies
from trimsfs.extras.gpu.copy_requests import CopyRequest, MemoryKind, device_of_attribute, matching, parse_request
from trimsfs.extras.gpu.descriptor_server import DescriptorServer
from trimsfs.extras.gpu.holders import holder_of
from trimsfs.extras.gpu.tier.pool import Copy, CopyKey, Lease, Pool
from trimsfs.formats.table import Tensor
from trimsfs.types import Generation

DIRECTORY = "gpu"
"""The control directory of a model file; it has one file for each device and copy."""

RENDERED = 16
"""The number of cached tensor listings, which clients read piece by piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IoctlAnswer:
    """The answer to ``TRIMSFS_IOC_GPU``: bytes of the memory, bytes used, and a handle, or a token and a socket."""

    size: int
    nbytes: int
    handle: bytes
    token: str
    socket: str


class LeaseFile:
    """An open control file, which is a lease. Its content describes the copy and how to open it."""

    def __init__(self, surface: "GpuInterface", lease: Lease, pattern: str | None) -> None:
        self.lease = lease
        self._surface = surface
        self._pattern = pattern

    async def read(self, offset: int, size: int) -> bytes:
        # Never waits, as no signal could interrupt that: it also describes a copy whose adoption still runs.
        copy = self.lease.copy
        if copy.done.is_set() and not copy.ready:
            raise StaleHandleError(f"/{copy.generation.key}: its memory on {copy.device} is lost")
        text = b""
        for piece in self._surface.description(self.lease, self._pattern):
            text += piece[max(0, offset) : max(0, offset) + size - len(text)]
            offset -= len(piece)
        return text

    def close(self) -> None:
        self._surface.ended(self.lease)


class GpuInterface:
    """The copies of a mount, as programs see them."""

    def __init__(self, copies: GpuCopies) -> None:
        self._copies = copies
        self.descriptors = DescriptorServer(copies.share, copies.release, may_share=copies.may_share)
        self._by_handle: dict[int, list[Lease]] = {}
        self._rendered: LRUCache[tuple[CopyKey, str | None], bytes] = LRUCache(RENDERED)

    def devices(self) -> list[str]:
        """The UUIDs of the devices that copies can be on."""
        return sorted(self._copies.pools)

    def knows(self, name: str) -> bool:
        """Whether a control file may have this name; its open checks whether the device exists."""
        return parse_request(name) is not None

    async def open(self, generation: Generation, name: str, uid: int, pid: int) -> LeaseFile:
        """Lease the copy that a control file's name requests. Raises as `GpuCopies.lease`."""
        asked = parse_request(name)
        assert asked is not None
        return LeaseFile(self, await self._copies.lease(generation, asked, holder_of(uid, pid)), asked.pattern)

    def assign_handle(self, file: LeaseFile, handle: int) -> None:
        """Record the lease of a control file, open under *handle*."""
        self._copies.ledger.record_lease(file.lease, handle)

    def restored(self, handle: int, name: str) -> LeaseFile | None:
        """A control file that an earlier server opened; None if its copy is lost."""
        leases, asked = self._copies.ledger.leases(handle), parse_request(name)
        return LeaseFile(self, leases[0], asked.pattern) if leases and asked is not None else None

    def ended(self, lease: Lease) -> None:
        """End a lease."""
        self.descriptors.ended(lease)
        self._copies.release(lease)

    # Leases of open model files

    async def lend(
        self, generation: Generation, handle: int, uid: int, pid: int, device: str, memory: MemoryKind
    ) -> IoctlAnswer:
        """Lease a copy for as long as a model file is open. Raises as `GpuCopies.lease`."""
        lease = self._existing_lease(handle, uid, device, memory)
        if lease is None:
            lease = await self._copies.lease(generation, CopyRequest(device, memory), holder_of(uid, pid))
            self._by_handle.setdefault(handle, []).append(lease)
            self._copies.ledger.record_lease(lease, handle)
        copy = lease.copy
        token = self.descriptors.token(lease) if copy.handle is None else ""
        return IoctlAnswer(
            size=copy.size,
            nbytes=copy.layout.nbytes,
            handle=copy.handle or b"",
            token=token,
            socket=str(self.descriptors.path or "") if token else "",
        )

    def _existing_lease(self, handle: int, uid: int, device: str, memory: MemoryKind) -> Lease | None:
        """The lease that an open file already has of such a copy, so that repeated requests share it."""
        for lease in self._by_handle.get(handle, ()):
            copy = lease.copy
            if copy.ready and (lease.holder.uid, copy.device, copy.key.memory) == (uid, device, memory):
                return lease
        return None

    def closed(self, handle: int) -> None:
        """End the leases of a closed model file."""
        for lease in self._by_handle.pop(handle, ()):
            self.ended(lease)

    def restore_file(self, handle: int) -> None:
        """Take over the leases of a model file that an earlier server opened."""
        leases = self._copies.ledger.leases(handle)
        if leases:
            self._by_handle[handle] = leases

    def all_restored(self) -> None:
        """End the leases of files that are no longer open, after the takeover of all others."""
        for lease in self._copies.ledger.unclaimed():
            self.ended(lease)

    def xattr(self, generation: Generation, name: str, uid: int) -> bytes | None:
        """The value of an attribute, named without its prefix; None for other attributes, and without a copy."""
        device = device_of_attribute(name)
        return self._copies.handle(generation, device, uid) if device is not None else None

    # Descriptions

    def resident(self, generation: Generation) -> dict[str, int]:
        """Bytes of a generation on each device that has any."""
        return self._copies.resident(generation)

    def generations(self) -> dict[str, Generation]:
        """The generations that have copies, by token."""
        return {copy.key.token: copy.generation for pool in self._copies.pools.values() for copy in pool.copies}

    def description(self, lease: Lease, pattern: str | None) -> tuple[bytes, ...]:
        """The description of a copy for the holder of a lease: one line of JSON, in pieces."""
        copy = lease.copy
        description: dict[str, Any] = {
            "device": copy.device,
            "generation": copy.key.token,
            "memory": copy.key.memory,
            "size": copy.size,
            "nbytes": copy.layout.nbytes,
            "format": copy.layout.format,
        }
        if copy.handle is not None:
            description["ipc_handle"] = copy.handle.hex()
        else:
            description |= {"socket": str(self.descriptors.path or ""), "token": self.descriptors.token(lease)}
        return json.dumps(description).encode()[:-1], b', "tensors": ', self._tensors(copy, pattern), b"}\n"

    def _tensors(self, copy: Copy, pattern: str | None) -> bytes:
        """The tensors of a copy that match, with their offsets in it, as JSON."""
        key = (copy.key, pattern)
        rendered = self._rendered.get(key)
        if rendered is None:
            rendered = self._rendered[key] = _rendered(matching(copy.layout.tensors, pattern))
        return rendered

    def facts(self) -> dict[str, object]:
        """The facts about devices, for operators."""
        return {
            "unavailable": self._copies.unavailable,
            "socket": str(self.descriptors.path) if self.descriptors.path is not None else None,
            "devices": [_device(pool) for pool in self._copies.pools.values()],
        }

    def copies(self, may_tell: Callable[[Generation], bool], uid: int | None) -> list[dict[str, object]]:
        """The devices, each with its copies for which *may_tell* is true.

        For a user, only the copies that the user can lease and the user's own leases; for None, all.
        """
        return [
            _device(pool)
            | {
                "copies": [
                    _copy(copy, uid)
                    for copy in pool.copies
                    if may_tell(copy.generation) and (uid is None or copy.key.domain in {"all", f"uid {uid}"})
                ]
            }
            for pool in self._copies.pools.values()
        ]


def _rendered(tensors: Sequence[Tensor]) -> bytes:
    return json.dumps(
        [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "offset": tensor.offset,
                "nbytes": tensor.nbytes,
            }
            for tensor in tensors
        ]
    ).encode()


def _device(pool: Pool) -> dict[str, object]:
    found = pool.device.info
    return {
        "uuid": found.uuid,
        "name": found.name,
        "total_bytes": found.total,
        "budget_bytes": pool.budget,
        "used_bytes": pool.used,
        "failure": pool.device.failure,
    }


def _copy(copy: Copy, uid: int | None) -> dict[str, object]:
    return {
        "path": copy.generation.key.encode(errors="surrogateescape").decode(errors="replace"),
        "generation": copy.key.token,
        "memory": copy.key.memory,
        "domain": copy.key.domain,
        "tensors": copy.key.pattern,
        "bytes": copy.size,
        "state": "loaded" if copy.ready else "loading",
        "uses": copy.uses,
        "leased": len(copy.leases),
        "leases": [
            {
                "uid": lease.holder.uid,
                "pid": lease.holder.pid,
                "container": lease.holder.container,
                "since": lease.since,
            }
            for lease in copy.leases
            if uid is None or lease.holder.uid == uid
        ],
    }
