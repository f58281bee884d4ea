"""The copies on one device: their leases, the memory they use, and their eviction."""

import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from trimsfs.errors import DeviceFullError, TrimsError
from trimsfs.eviction_policies import Evictable, Policy, eager
from trimsfs.extras.gpu.cuda import CudaError, DeviceInfo, DeviceMemory
from trimsfs.extras.gpu.tier.device import Device
from trimsfs.extras.gpu.tier.layout import Layout
from trimsfs.types import Generation

log = logging.getLogger(__name__)

GRANULARITY = 2 << 20
"""Bytes: a device allocates multiples of it."""
FREE_CHECKS, FREE_INTERVAL_S = 25, 0.02
LOAD_RATE = 1e10
"""Bytes a second: the estimated rate of reloading a copy of unknown load time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The user and process of a lease, as the host sees them. ``pid`` is for operators only: it may be reused."""

    uid: int
    pid: int = 0
    container: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """Keeps a copy from eviction."""

    copy: "Copy"
    holder: Holder
    since: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyKey:
    """Identifies a copy: content, sharing domain, kind of memory, and pattern of tensors."""

    token: str
    domain: str
    memory: str
    pattern: str | None


@dataclass(slots=True, eq=False, kw_only=True)
class Copy:
    """A copy of a file, or of some of its tensors, on the device with UUID ``device``.

    ``done`` is set once it is loaded, or loading failed with ``error``. ``memory`` is None before, and again once it is
    ``gone``. Either ``descriptor`` or ``handle`` shares the memory. ``checked_by`` counts the comparisons under way.
    ``number`` is its number at the keeper, and ``slot`` its record in the ledger.
    """

    key: CopyKey
    device: str
    generation: Generation
    layout: Layout
    size: int
    done: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    error: TrimsError | None = None
    gone: bool = False
    memory: DeviceMemory | None = None
    descriptor: int | None = None
    handle: bytes | None = None
    number: int = 0
    slot: int = 0
    leases: set[Lease] = field(default_factory=set)
    checked_by: int = 0
    loaded: int = 0
    last_used: int = 0
    uses: int = 0
    load_s: float = 0.0

    @property
    def unwanted(self) -> bool:
        """Whether nobody leases or compares it, and the keeper does not hold it."""
        return not (self.leases or self.checked_by or self.number)

    @property
    def in_use(self) -> bool:
        """Whether it must stay, because it is leased, being compared or loading."""
        return bool(self.leases or self.checked_by or not self.done.is_set())

    @property
    def ready(self) -> bool:
        """Whether its memory is loaded and usable."""
        return self.done.is_set() and self.error is None and not self.gone


@dataclass(slots=True)
class Counts:
    """Counts of a pool since the server started."""

    hits: int = 0
    loads: int = 0
    failed_loads: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    evicted_bytes: int = 0


class Pool:
    """The copies on a device: at most *budget* bytes, with *headroom* left for other programs.

    The pool never evicts a copy that is leased, being compared, loading or pinned. It calls *before_free* before it
    frees a copy's memory, so that the keeper releases the memory too.

    Invariants: ``_all`` contains every copy until its memory is freed. ``_used`` counts a copy's bytes from their
    reservation until then. A copy that has left ``_copies`` gets no new lease.
    """

    def __init__(
        self,
        info: DeviceInfo,
        *,
        budget: int,
        headroom: int,
        policy: Policy,
        is_pinned: Callable[[Generation], Awaitable[bool]],
        before_free: Callable[[Copy], None],
    ) -> None:
        self.device = Device(info, on_failure=self.lose)
        self.budget = budget
        self.counts = Counts()
        self._headroom = headroom
        self._policy = policy
        self._is_pinned = is_pinned
        self._before_free = before_free
        self.comparing = trio.Lock()
        self._copies: dict[CopyKey, Copy] = {}
        self._all: set[Copy] = set()
        self._used = 0
        self._numbers = itertools.count(1)
        self._lock = trio.Lock()

    @property
    def used(self) -> int:
        """Bytes of the device that copies use."""
        return self._used

    @property
    def copies(self) -> list[Copy]:
        """The copies that are loaded or loading, and can be leased."""
        return list(self._copies.values())

    def find(self, key: CopyKey) -> Copy | None:
        """The copy with this key, or else one of the whole file."""
        whole = CopyKey(token=key.token, domain=key.domain, memory=key.memory, pattern=None)
        return self._copies.get(key) or self._copies.get(whole)

    def of(self, generation_token: str) -> list[Copy]:
        """The copies of a generation, in every domain."""
        return [copy for copy in self._copies.values() if copy.key.token == generation_token]

    def of_file(self, key: str) -> list[Copy]:
        """The copies of all generations of a file."""
        return [copy for copy in self._copies.values() if copy.generation.file == key]

    def add(self, copy: Copy) -> None:
        """Add a copy that is to be loaded."""
        assert copy.key not in self._copies
        self._copies[copy.key] = copy
        self._all.add(copy)
        copy.loaded = copy.last_used = next(self._numbers)

    def lease(self, copy: Copy, holder: Holder) -> Lease:
        """Lease a copy to a holder, and count the use."""
        copy.uses += 1
        copy.last_used = next(self._numbers)
        return self.add_lease(copy, holder)

    def add_lease(self, copy: Copy, holder: Holder) -> Lease:
        """Lease a copy to a holder without counting a use."""
        lease = Lease(copy, holder)
        copy.leases.add(lease)
        return lease

    def adopt(self, copy: Copy) -> None:
        """Add a copy of an earlier server, which has its memory already."""
        self.add(copy)
        self._used += copy.size

    def drop_lost(self, copy: Copy) -> None:
        """Remove an adopted copy whose memory is lost."""
        self.forget(copy)
        self._all.discard(copy)
        self._used -= copy.size

    def abandon(self, copy: Copy) -> None:
        """Cancel the load of a copy that nobody waits for."""
        self.forget(copy)
        copy.scope.cancel()

    async def allocate(self, copy: Copy) -> None:
        """Evict as needed, and allocate the memory of a copy. Raises DeviceFullError, DeviceError."""
        shared = copy.key.memory == "vmm"
        async with self._lock:
            await self._make_room(copy)
            self._used += copy.size
            try:
                try:
                    copy.memory = await self.device.allocate(copy.layout.nbytes, shared=shared)
                except CudaError:
                    # Another program has taken the free memory.
                    await self._evict(await self._victims(copy.size))
                    await self._wait_until_free(copy.size)
                    copy.memory = await self.device.allocate(copy.layout.nbytes, shared=shared)
            except CudaError:
                self._used -= copy.size
                raise await self._full(copy) from None
            except BaseException:
                self._used -= copy.size
                raise
            self._used += copy.memory.size - copy.size
            copy.size = copy.memory.size

    async def _make_room(self, copy: Copy) -> None:
        """Evict for a copy; nothing if all evictions would not suffice. Raises DeviceFullError, DeviceError."""
        if copy.size > self.budget:
            raise DeviceFullError(
                f"{copy.generation.key}: {_mb(copy.size)} exceed the {_mb(self.budget)} that copies may use of "
                f"{self.device.uuid}: raise gpu_memory, or request some of its tensors"
            )
        needed = copy.size + self._headroom
        missing = max(self._used + copy.size - self.budget, needed - await self.device.free_bytes())
        if missing <= 0:
            return
        victims = await self._victims(missing)
        if sum(victim.size for victim in victims) < missing and await self._abandon_unwanted(copy):
            missing = max(self._used + copy.size - self.budget, needed - await self.device.free_bytes())
            victims = await self._victims(missing)
        if sum(victim.size for victim in victims) < missing:
            raise await self._full(copy)
        await self._evict(victims)
        # Of the victims, some may have been leased meanwhile.
        if self._used + copy.size > self.budget or not await self._wait_until_free(needed):
            raise await self._full(copy)

    async def _abandon_unwanted(self, copy: Copy) -> bool:
        """Cancel other loads that nobody waits for; returns whether there were any."""
        unwanted = [one for one in self._all if one is not copy and not one.done.is_set() and one.unwanted]
        for one in unwanted:
            self.abandon(one)
            await one.done.wait()
        return bool(unwanted)

    async def _wait_until_free(self, needed: int) -> bool:
        """Wait until *needed* bytes are free, while holders release evicted memory; False if that takes too long."""
        for _ in range(FREE_CHECKS):
            if await self.device.free_bytes() >= needed:
                return True
            await trio.sleep(FREE_INTERVAL_S)
        return False

    async def _full(self, copy: Copy) -> DeviceFullError:
        free = await self.device.free_bytes()
        in_use = sum(other.size for other in self._copies.values() if other.in_use and other is not copy)
        return DeviceFullError(
            f"{copy.generation.key}: no room for {_mb(copy.size)} on {self.device.uuid}: {_mb(free)} are free, and "
            f"gpu_headroom keeps {_mb(self._headroom)}; copies take {_mb(self._used)} of the "
            f"{_mb(self.budget)} of gpu_memory, {_mb(in_use)} of them in use: end programs that use "
            "copies (`trimsfs status --gpu` names them)"
        )

    async def tidy(self) -> None:
        """Evict all idle copies, if the policy is eager."""
        if self._policy is eager:
            async with self._lock:
                await self._evict(await self._victims(1))

    async def drop(self, copy: Copy) -> bool:
        """Evict a copy; returns False if it is in use."""
        async with self._lock:
            if not self.serves(copy):
                return True
            if copy.in_use:
                return False
            await self._free(copy)
        return True

    def serves(self, copy: Copy) -> bool:
        """Whether the pool still leases a copy."""
        return self._copies.get(copy.key) is copy

    def forget(self, copy: Copy) -> None:
        """Lease a copy to no more holders; its present ones keep it."""
        if self.serves(copy):
            del self._copies[copy.key]

    async def discard(self, copy: Copy) -> None:
        """Stop leasing a copy, and free its memory; nobody may use it."""
        self.forget(copy)
        self._all.discard(copy)
        copy.gone = True
        self._before_free(copy)
        memory, copy.memory = copy.memory, None
        if memory is not None:
            await self.device.free(memory)
            self._used -= copy.size

    def lose(self) -> None:
        """Drop all copies of a device that has failed."""
        for copy in list(self._all):
            if copy.done.is_set():
                self.forget(copy)
                self._all.discard(copy)
                copy.gone = True
                self._before_free(copy)
                if copy.memory is not None:
                    copy.memory = None
                    self._used -= copy.size

    async def _victims(self, wanted: int) -> list[Copy]:
        """The copies that the policy evicts for *wanted* bytes; they may free fewer."""
        idle = {str(number): copy for number, copy in enumerate(self.copies) if not copy.in_use}
        entries = [
            Evictable(
                name=name,
                size=copy.size,
                last_used=copy.last_used,
                loaded=copy.loaded,
                uses=copy.uses,
                cost_s=copy.load_s or copy.size / LOAD_RATE,
                key=copy.generation.key,
            )
            for name, copy in idle.items()
            if not await self._is_pinned(copy.generation)
        ]
        return [idle[victim.name] for victim in self._policy(entries, wanted)]

    async def _evict(self, victims: list[Copy]) -> None:
        for copy in victims:
            if not copy.in_use and self.serves(copy):
                await self._free(copy)

    async def _free(self, copy: Copy) -> None:
        with trio.CancelScope(shield=True):
            await self.discard(copy)
        self.counts.evictions += 1
        self.counts.evicted_bytes += copy.size
        log.info("evicted /%s from %s: %d bytes", copy.generation.key, self.device.uuid, copy.size)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def rounded(nbytes: int) -> int:
    """The approximate number of bytes that a device allocates for *nbytes*."""
    return -(-max(1, nbytes) // GRANULARITY) * GRANULARITY
