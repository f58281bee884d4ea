"""What outlives a server of its copies: the keeper holds their memory, and the ledger tells what is in it.

A copy that is lent by descriptor stays in the device's memory for as long as anybody has a descriptor of it. One that
is lent by handle goes with the server.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

from trimsfs.formats.table import Tensor
from trimsfs.handover.ledger import Ledger, Record, RecordKind
from trimsfs.tiers.gpu.layout import Layout, Part
from trimsfs.tiers.gpu.pool import Copy, CopyKey, Holder, Lease
from trimsfs.types import Generation

_MADE, _HELD = 1, 2
"""Counts of a copy in the ledger: the keeper may hold it, or does."""


class DescriptorStore(Protocol):
    """Who keeps descriptors when a server dies, by numbers: the keeper."""

    async def hold(self, number: int, descriptor: int) -> bool:
        """Keep a descriptor; False when that is not possible."""

    def let_go(self, number: int, done: Callable[[], None]) -> None:
        """Keep it no longer, soon, and call *done* then."""

    async def recall(self, number: int) -> int | None:
        """A descriptor that is kept; None when it is not."""


class CopyLedger:
    """The copies and leases of one server, in a ledger, as far as they can be gone on with."""

    def __init__(self, ledger: Ledger, custodian: DescriptorStore) -> None:
        self._ledger = ledger
        self._store = custodian
        self._lease_slots: dict[Lease, int] = {}
        self.copies: list[Copy] = []
        self._leases: dict[int, list[Lease]] = {}
        self._last = 0
        self._restore()
        self._numbers = itertools.count(1 + self._last)

    def _restore(self) -> None:
        by_number: dict[int, Copy] = {}
        for record in self._ledger.taken(RecordKind.GPU_COPY):
            self._last = max(self._last, record.number)
            if record.count != _HELD:
                self._let_go(record.number, record.slot)
                continue
            by_number[record.number] = _unpacked(record)
            self.copies.append(by_number[record.number])
        for record in self._ledger.taken(RecordKind.GPU_LEASE):
            content = json.loads(record.content)
            copy = by_number.get(content["copy"])
            if copy is None:
                self._ledger.set(record.slot, 0)
                continue
            lease = Lease(copy, Holder(**content["holder"]), content["since"])
            copy.leases.add(lease)
            self._lease_slots[lease] = record.slot
            self._leases.setdefault(record.number, []).append(lease)

    def leases(self, handle: int) -> list[Lease]:
        """The leases that an open file has since before this server was started; they are told once."""
        return self._leases.pop(handle, [])

    def unclaimed(self) -> Iterator[Lease]:
        """Leases of files that are not open any more."""
        while self._leases:
            _, leases = self._leases.popitem()
            yield from leases

    async def made(self, copy: Copy) -> None:
        """A copy has been loaded: have it kept, if it can be."""
        if copy.descriptor is None:
            return
        number = next(self._numbers)
        slot = self._ledger.add(RecordKind.GPU_COPY, number, _packed(copy), count=_MADE)
        try:
            held = await self._store.hold(number, copy.descriptor)
        except BaseException:
            self._let_go(number, slot)
            raise
        self._ledger.set(slot, _HELD if held else 0)
        if held:
            copy.number, copy.slot = number, slot

    async def recall(self, copy: Copy) -> bool:
        """Have the descriptor of an earlier server's copy again; False when it is lost."""
        copy.descriptor = await self._store.recall(copy.number)
        return copy.descriptor is not None

    def let_go(self, copy: Copy) -> None:
        """A copy is about to be freed."""
        descriptor, copy.descriptor = copy.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if copy.number:
            self._let_go(copy.number, copy.slot)
            copy.number = 0

    def _let_go(self, number: int, slot: int) -> None:
        self._ledger.set(slot, _MADE)  # whatever happens, it is not to be taken over
        self._store.let_go(number, lambda: self._ledger.set(slot, 0))

    def lent(self, lease: Lease, handle: int) -> None:
        """An open file has a lease."""
        if lease.copy.number:
            content = {"copy": lease.copy.number, "holder": asdict(lease.holder), "since": lease.since}
            self._lease_slots[lease] = self._ledger.add(RecordKind.GPU_LEASE, handle, json.dumps(content).encode())

    def returned(self, lease: Lease) -> None:
        """A lease has ended."""
        slot = self._lease_slots.pop(lease, None)
        if slot is not None:
            self._ledger.set(slot, 0)


def _packed(copy: Copy) -> bytes:
    """A copy for the ledger."""
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
