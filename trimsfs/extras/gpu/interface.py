"""The extra for GPU copies: programs lease them by files, attributes and ioctls; operators see and command them."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from cachetools import LRUCache

from trimsfs.control.authorisation import Caller
from trimsfs.control.extra import Admitted, Command, Extra, IoctlRequest
from trimsfs.control.jobs import Order
from trimsfs.control.progress import Progress
from trimsfs.errors import InvalidRequestError, StaleHandleError
from trimsfs.extras.gpu.copies import GpuCopies
from trimsfs.extras.gpu.copy_requests import (
    CopyRequest,
    MemoryKind,
    device_of_attribute,
    matching,
    parse_request,
    parse_warm_command,
)
from trimsfs.extras.gpu.descriptor_server import DescriptorServer
from trimsfs.extras.gpu.holder_identity import holder_of
from trimsfs.extras.gpu.tier.leased_copies import Copy, CopyKey, Holder, Lease, Pool
from trimsfs.formats.table import entry_of
from trimsfs.fuse import _libfuse
from trimsfs.types import Generation

VERIFY_GPU = "verify-gpu"
_GPU = struct.Struct("=48sIIQQ64s40s112s")
"""A ``struct trimsfs_gpu``."""
_MEMORY = {0: MemoryKind.VMM, 1: MemoryKind.IPC}
RENDERED = 16
"""The number of cached tensor listings, which clients read piece by piece."""


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

    def record(self, handle: int) -> None:
        self._surface.record(self.lease, handle)

    def close(self) -> None:
        self._surface.ended(self.lease)


class GpuInterface(Extra):
    """The copies of a mount, as programs see them."""

    directory = "gpu"

    def __init__(self, copies: GpuCopies) -> None:
        self.copies = copies
        self.sources = {"gpu": copies.statistics}
        self.ioctls = {_libfuse.IOC_GPU: self._answer_ioctl}
        self.descriptors = DescriptorServer(copies.share, copies.release, may_share=copies.may_share)
        self._by_handle: dict[int, list[Lease]] = {}
        self._rendered: LRUCache[tuple[CopyKey, str | None], bytes] = LRUCache(RENDERED)

    def names(self) -> list[str]:
        """The UUIDs of the devices that copies can be on."""
        return sorted(self.copies.pools)

    def knows(self, name: str) -> bool:
        """Whether a control file may have this name; its open checks whether the device exists."""
        return parse_request(name) is not None

    async def open(self, generation: Generation, name: str, caller: Caller) -> LeaseFile:
        """Lease the copy that a control file's name requests. Raises as `GpuCopies.lease`."""
        asked, holder = parse_request(name), holder_of(caller.uid, caller.pid)
        assert asked is not None
        return LeaseFile(self, await self.copies.lease(generation, asked, holder), asked.pattern)

    def record(self, lease: Lease, handle: int) -> None:
        """Record the lease of a control file, open under *handle*."""
        self.copies.ledger.record_lease(lease, handle)

    def restored(self, handle: int, name: str) -> LeaseFile | None:
        """A control file that an earlier server opened; None if its copy is lost."""
        leases, asked = self.copies.ledger.leases(handle), parse_request(name)
        return LeaseFile(self, leases[0], asked.pattern) if leases and asked is not None else None

    def ended(self, lease: Lease) -> None:
        """End a lease."""
        self.descriptors.ended(lease)
        self.copies.release(lease)

    def shows_content(self, name: str) -> bool:
        """Whether it leads to a copy of the content."""
        return name.startswith((f"{self.directory}/", f"{self.directory}."))

    # Commands

    def command_names(self) -> list[str]:
        """The commands that load files to the devices, or compare what is there; none without a device."""
        devices = self.copies.pools
        return [VERIFY_GPU, *(f"warm-{device}" for device in devices)] if devices else []

    def knows_command(self, name: str) -> bool:
        """Whether a command may have this name, whatever devices there are."""
        return name == VERIFY_GPU or parse_warm_command(name) is not None

    def command(self, order: Order, admitted: Admitted) -> Command | None:
        """What carries out an order; None for other commands."""
        if order.name == VERIFY_GPU:
            return self._verify
        parsed = parse_warm_command(order.name)
        if parsed is None:
            return None
        request, uid = parsed
        holder = Holder(uid=order.uid if uid is None else uid)

        async def warm(generation: Generation, progress: Progress) -> None:
            """Load a copy of a file. Of a directory, files without tensors are left out."""
            async with admitted(generation, progress):
                models_only = order.generation is None
                if not await self.copies.warm(generation, request, holder, models_only=models_only):
                    progress.left_out_files += 1

        return warm

    async def _verify(self, generation: Generation, progress: Progress) -> None:
        """Compare a file's copies with the file."""
        compared = await self.copies.compare(generation)  # before the +=: other files count during the await
        progress.compared_copies += compared

    def check_idle(self, generation: Generation) -> None:
        """As `GpuCopies.check_idle`."""
        self.copies.check_idle(generation)

    async def evicted(self, generation: Generation) -> None:
        """Evict the copies of a file, too. Raises InUseError when one is in use."""
        await self.copies.evict(generation)

    async def repaired(self, generation: Generation) -> None:
        """Compare the copies of a file whose bytes were wrong: theirs may be, too."""
        await self.copies.compare(generation)

    # Leases of open model files

    async def _answer_ioctl(self, request: IoctlRequest) -> bytes:
        """Lease a copy for as long as a model file is open. Raises as `GpuCopies.lease`."""
        device, kind, *_ = _GPU.unpack(request.data)
        if kind not in _MEMORY:
            raise InvalidRequestError(f"GPU memory of kind {kind}: not known: use 0 (VMM) or 1 (IPC)")
        name, memory = device.split(b"\0")[0].decode(errors="replace"), _MEMORY[kind]
        lease = self._existing_lease(request.handle, request.uid, name, memory)
        if lease is None:
            holder = holder_of(request.uid, request.pid)
            lease = await self.copies.lease(request.generation, CopyRequest(name, memory), holder)
            self._by_handle.setdefault(request.handle, []).append(lease)
            self.copies.ledger.record_lease(lease, request.handle)
        copy = lease.copy
        token = self.descriptors.token(lease) if copy.handle is None else ""
        socket = str(self.descriptors.path or "") if token else ""
        sent = (copy.handle or b"", token.encode(), os.fsencode(socket))
        return _GPU.pack(device, kind, 0, copy.size, copy.layout.nbytes, *sent)

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
        leases = self.copies.ledger.leases(handle)
        if leases:
            self._by_handle[handle] = leases

    def all_restored(self) -> None:
        """End the leases of files that are no longer open, after the takeover of all others."""
        for lease in self.copies.ledger.unclaimed():
            self.ended(lease)

    def xattr(self, generation: Generation, name: str, caller: Callable[[], Caller]) -> bytes | None:
        """The value of an attribute, named without its prefix; None for other attributes, and without a copy."""
        device = device_of_attribute(name)
        return self.copies.handle(generation, device, caller().uid) if device is not None else None

    # Descriptions

    def resident(self, generation: Generation) -> dict[str, object]:
        """Bytes of a generation on each device that has any."""
        return {"gpu": self.copies.resident(generation)}

    def generations(self) -> dict[str, Generation]:
        """The generations that have copies, by token."""
        return {copy.key.token: copy.generation for pool in self.copies.pools.values() for copy in pool.copies}

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
            entries = [entry_of(tensor) for tensor in matching(copy.layout.tensors, pattern)]
            rendered = self._rendered[key] = json.dumps(entries).encode()
        return rendered

    def facts(self) -> dict[str, object]:
        """The facts about devices, for operators."""
        return {
            "gpu": {
                "unavailable": self.copies.unavailable,
                "socket": str(self.descriptors.path) if self.descriptors.path is not None else None,
                "devices": [_device(pool) for pool in self.copies.pools.values()],
            }
        }

    def report(self, may_tell: Callable[[Generation], bool], uid: int | None) -> Mapping[str, object]:
        """The devices, each with its copies for which *may_tell* is true.

        For a user, only the copies that the user can lease and the user's own leases; for None, all.
        """
        devices = [
            _device(pool)
            | {
                "copies": [
                    _copy(copy, uid)
                    for copy in pool.copies
                    if may_tell(copy.generation) and (uid is None or copy.key.domain in {"all", f"uid {uid}"})
                ]
            }
            for pool in self.copies.pools.values()
        ]
        return {"devices": devices}


def _device(pool: Pool) -> dict[str, object]:
    info = pool.device.info
    return {
        "uuid": info.uuid,
        "name": info.name,
        "total_bytes": info.total,
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
            {**asdict(lease.holder), "since": lease.since}
            for lease in copy.leases
            if uid is None or lease.holder.uid == uid
        ],
    }
