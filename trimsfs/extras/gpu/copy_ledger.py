"""Hands GPU copies to the next server: the keeper holds their memory, and the ledger describes them and their leases.

Memory shared by descriptor (vmm) lives while any process has a descriptor of it or a mapping. Memory shared by IPC
handle is lost when the server that allocated it ends.
"""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trimsfs.extras.gpu.tier.layout import Layout, Part
from trimsfs.extras.gpu.tier.leased_copies import Copy, CopyKey, Holder, Lease
from trimsfs.formats.table import Tensor
from trimsfs.handover.ledger import Ledger, Record, RecordKind
from trimsfs.server.environment import DescriptorStore
from trimsfs.types import Generation

_SENDING, _HELD = 1, 2
"""The count of a copy's record in the ledger: the server is sending the descriptor, or the keeper holds it."""


class CopyLedger:
    """The copies and leases of one server, recorded in the ledger for the next one.

    ``copies`` are those that the previous server recorded.
    """

    def __init__(self, ledger: Ledger, custodian: DescriptorStore) -> None:
        self._ledger = ledger
        self._descriptors = custodian
        self._lease_slots: dict[Lease, int] = {}
        self.copies: list[Copy] = []
        self._leases: dict[int, list[Lease]] = {}
        self._last = 0
        self._restore()
        self._numbers = itertools.count(1 + self._last)

    def _restore(self) -> None:
        by_number: dict[int, Copy] = {}
        for record in self._ledger.inherited(RecordKind.GPU_COPY):
            self._last = max(self._last, record.number)
            if record.count != _HELD:
                self._let_go(record.number, record.slot)
                continue
            by_number[record.number] = _unpacked(record)
            self.copies.append(by_number[record.number])
        for record in self._ledger.inherited(RecordKind.GPU_LEASE):
            content = json.loads(record.content)
            copy = by_number.get(content["copy"])
            if copy is None:
                self._ledger.set_count(record.slot, 0)
                continue
            lease = Lease(copy, Holder(**content["holder"]), content["since"])
            copy.leases.add(lease)
            self._lease_slots[lease] = record.slot
            self._leases.setdefault(record.number, []).append(lease)

    def leases(self, handle: int) -> list[Lease]:
        """Take the leases of a file that an earlier server opened; a second call for a handle returns none."""
        return self._leases.pop(handle, [])

    def unclaimed(self) -> Iterator[Lease]:
        """Take the leases of files that are no longer open."""
        while self._leases:
            _, leases = self._leases.popitem()
            yield from leases

    async def record_copy(self, copy: Copy) -> None:
        """Record a loaded copy, and hand its descriptor to the keeper if the keeper can hold it."""
        if copy.descriptor is None:
            return
        number = next(self._numbers)
        slot = self._ledger.add(RecordKind.GPU_COPY, number, _packed(copy), count=_SENDING)
        try:
            held = await self._descriptors.hold(number, copy.descriptor)
        except BaseException:
            self._let_go(number, slot)
            raise
        if held:
            self._ledger.set_count(slot, _HELD)
            copy.number, copy.slot = number, slot
        else:
            self._let_go(number, slot)  # a keeper that did not answer may hold it later

    async def recall(self, copy: Copy) -> bool:
        """Get the descriptor of an earlier server's copy from the keeper; False if it is lost."""
        copy.descriptor = await self._descriptors.recall(copy.number)
        return copy.descriptor is not None

    def let_go(self, copy: Copy) -> None:
        """Close a copy's descriptor before the copy is freed, and have the keeper close its own."""
        descriptor, copy.descriptor = copy.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if copy.number:
            self._let_go(copy.number, copy.slot)
            copy.number = 0

    def _let_go(self, number: int, slot: int) -> None:
        self._ledger.set_count(slot, _SENDING)  # if this server dies now, the next one must not adopt the copy
        self._descriptors.let_go(number, lambda: self._ledger.set_count(slot, 0))

    def record_lease(self, lease: Lease, handle: int) -> None:
        """Record the lease of an open file."""
        if lease.copy.number:
            content = {"copy": lease.copy.number, "holder": asdict(lease.holder), "since": lease.since}
            self._lease_slots[lease] = self._ledger.add(RecordKind.GPU_LEASE, handle, json.dumps(content).encode())

    def forget_lease(self, lease: Lease) -> None:
        """Remove the record of an ended lease."""
        slot = self._lease_slots.pop(lease, None)
        if slot is not None:
            self._ledger.set_count(slot, 0)


def _packed(copy: Copy) -> bytes:
    """A copy as the ledger stores it."""
    content: dict[str, Any] = {
        "device": copy.device,
        "size": copy.size,
        "key": asdict(copy.key),
        "generation": asdict(copy.generation),
        "format": copy.layout.format,
        "nbytes": copy.layout.nbytes,
        "tensors": copy.layout.tensors,
        "parts": copy.layout.parts,
    }
    return json.dumps(content).encode()


def _unpacked(record: Record) -> Copy:
    content = json.loads(record.content)
    tensors = (Tensor(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in content["tensors"])
    layout = Layout(
        format=content["format"],
        tensors=tuple(tensors),
        parts=tuple(Part(*part) for part in content["parts"]),
        nbytes=content["nbytes"],
    )
    return Copy(
        key=CopyKey(**content["key"]),
        device=content["device"],
        generation=Generation(**content["generation"]),
        layout=layout,
        size=content["size"],
        number=record.number,
        slot=record.slot,
    )
