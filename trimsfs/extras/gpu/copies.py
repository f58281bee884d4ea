"""Manages the copies on the GPUs of a host: loads each once, leases it to programs, and evicts it for others."""

import logging
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from trimsfs.concurrency.background import Background
from trimsfs.concurrency.in_thread import in_thread
from trimsfs.control.tensor_tables import TensorTables
from trimsfs.errors import (
    CacheUnusableError,
    CopyDamagedError,
    DeviceError,
    InUseError,
    InvalidRequestError,
    NoSuchEntryError,
    TrimsError,
)
from trimsfs.eviction_policies import policy_named
from trimsfs.extras.gpu import cuda
from trimsfs.extras.gpu.copy_ledger import CopyLedger
from trimsfs.extras.gpu.copy_loader import CopyLoader
from trimsfs.extras.gpu.copy_requests import CopyRequest, MemoryKind, matching
from trimsfs.extras.gpu.cuda import CudaError
from trimsfs.extras.gpu.gpu_statistics import GpuStatistics, statistics_of
from trimsfs.extras.gpu.tier.layout import Layout, lay_out
from trimsfs.extras.gpu.tier.leased_copies import Copy, CopyKey, Holder, Lease, Pool, rounded
from trimsfs.extras.gpu.tier.staging import differs
from trimsfs.formats import TensorTable
from trimsfs.options import MountOptions
from trimsfs.processes import shown
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import Inspection, Residencies
from trimsfs.types import Generation

log = logging.getLogger(__name__)

MOST_WAITING, MOST_WAITING_OF_USER = 512, 256
"""The most requests that may wait at once: half of those that the server can answer at a time."""
LINGER_S = 2.0
"""How long a load continues after the last program that waits for it has gone."""


class GpuCopies:
    """The copies of a mount. *unavailable* says why there can be none.

    `run` searches for devices; requests wait until the search has ended.
    """

    def __init__(
        self,
        blobs: Inspection,
        residencies: Residencies,
        loader: CopyLoader,
        tables: TensorTables,
        ledger: CopyLedger,
        options: MountOptions,
        *,
        unavailable: str | None,
    ) -> None:
        self._blobs = blobs
        self._residencies = residencies
        self._loader = loader
        self._tables = tables
        self.ledger = ledger
        self._options = options
        self._background = Background()
        self._searched = trio.Event()
        self._waiting: Counter[int] = Counter()
        self.unavailable = unavailable
        self.pools: dict[str, Pool] = {}
        if unavailable is not None:
            self._searched.set()

    def statistics(self) -> GpuStatistics:
        return statistics_of(self.pools)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find the devices, take over an earlier server's copies, and load others until the server ends."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._background.run)
            task_status.started()
            if self.unavailable is None:
                await self._search()
            if self.unavailable is not None:
                log.info("the mount uses no GPU: %s", self.unavailable)
            await self._adopt_all()
            try:
                await trio.sleep_forever()
            finally:
                for pool in self.pools.values():
                    pool.device.abandon()

    async def _search(self) -> None:
        try:
            devices = await in_thread(cuda.devices, abandon_on_cancel=True)  # a driver may hang
        except CudaError as error:
            self.unavailable = str(error)
        else:
            for device in devices:
                log.info("device %s: %s, %d bytes", device.uuid, device.name, device.total)
                self._add(device)
        self._add_recorded()
        self._searched.set()

    def _add(self, device: cuda.DeviceInfo) -> None:
        if self._options.gpu_headroom >= device.total:
            log.warning("device %s: gpu_headroom exceeds its memory: lower it", device.uuid)
        self.pools[device.uuid] = Pool(
            device,
            budget=int(device.total * self._options.gpu_memory),
            headroom=self._options.gpu_headroom,
            policy=policy_named(self._options.eviction.gpu),
            is_pinned=self._is_pinned,
            before_free=self.ledger.let_go,
        )

    async def _is_pinned(self, generation: Generation) -> bool:
        try:
            return (await self._residencies.of(generation)).pinned
        except CacheUnusableError:
            return True  # keep the copy while the index cannot tell

    # Copies of an earlier server

    def _add_recorded(self) -> None:
        """Add the recorded copies to their pools, so that requests for them wait until `_adopt` is done."""
        for copy in self.ledger.copies:
            pool = self.pools.get(copy.device)
            if pool is not None:
                pool.adopt(copy)

    async def _adopt_all(self) -> None:
        recorded, self.ledger.copies = self.ledger.copies, []
        by_device = defaultdict[str, list[Copy]](list)
        for copy in recorded:
            by_device[copy.device].append(copy)
        async with trio.open_nursery() as nursery:  # a device that hangs holds up no other
            for device, copies in by_device.items():
                nursery.start_soon(self._adopt_of, self.pools.get(device), copies)

    async def _adopt_of(self, pool: Pool | None, copies: Sequence[Copy]) -> None:
        for copy in copies:
            await self._adopt(copy, pool)
            if pool is not None and not copy.leases:  # the last lease may have ended before the device was found
                self._background.start(self._after_use, pool, copy)

    async def _adopt(self, copy: Copy, pool: Pool | None) -> None:
        try:
            if pool is None or not await self.ledger.recall(copy):
                raise DeviceError(f"/{copy.generation.key}: its memory on {copy.device} is lost")
            assert copy.descriptor is not None
            copy.memory = await pool.device.adopt(copy.size, copy.descriptor)
            log.info("/%s: took over %d bytes on %s", copy.generation.key, copy.size, copy.device)
        except (TrimsError, CudaError) as error:
            log.warning("%s", error)
            copy.error, copy.gone = DeviceError(str(error)), True
            self.ledger.let_go(copy)
            if pool is not None:
                pool.drop_lost(copy)
        finally:
            copy.done.set()

    # Leases

    async def lease(self, generation: Generation, request: CopyRequest, holder: Holder) -> Lease:
        """Lease a copy, and load it first if there is none; `release` ends the lease.

        Raises NoSuchEntryError when no device or no tensor matches, and InUseError when too many requests wait. Also
        raises DeviceFullError, DeviceError, and the errors of a read of the file.
        """
        with self._waiting_request(holder.uid):
            pool = await self._pool(request.device)
            key = self._key(generation, request, self._domain(holder))
            copy = await self._find_or_load(pool, key, generation)
            lease = pool.lease(copy, holder)
            try:
                await copy.done.wait()
                if copy.error is not None:
                    raise copy.error.with_traceback(None)
                if copy.gone:
                    raise DeviceError(f"{request.device}: {pool.device.failure}")
            except BaseException:
                self.release(lease)
                raise
            return lease

    @contextmanager
    def _waiting_request(self, uid: int) -> Iterator[None]:
        """Count a waiting request of a user, because each takes one of the server's tasks. Raises InUseError."""
        if self._waiting.total() >= MOST_WAITING or self._waiting[uid] >= MOST_WAITING_OF_USER:
            raise InUseError(
                f"too many requests for GPU copies are waiting, {self._waiting[uid]} of them of uid {uid}: try again"
            )
        self._waiting[uid] += 1
        try:
            yield
        finally:
            self._waiting[uid] -= 1

    async def _find_or_load(self, pool: Pool, key: CopyKey, generation: Generation) -> Copy:
        copy = pool.find(key)
        if copy is None:
            layout = await self._layout(generation, key.pattern)
            copy = pool.find(key)  # another request may have begun it meanwhile
            if copy is None:
                return self._start_loading(pool, key, generation, layout)
        if key.pattern is not None and not matching(copy.layout.tensors, key.pattern):
            raise _no_tensor(generation, key.pattern)
        pool.counts.hits += 1
        return copy

    def release(self, lease: Lease) -> None:
        """End a lease; after the last one, the policy may evict the copy."""
        copy = lease.copy
        self.ledger.forget_lease(lease)
        copy.leases.discard(lease)
        pool = self.pools.get(copy.device)
        if copy.leases or pool is None or not self._background.running:
            return
        if copy.unwanted and not copy.done.is_set():
            self._background.start(self._abandon, pool, copy)
        else:
            self._background.start(self._after_use, pool, copy)

    async def _abandon(self, pool: Pool, copy: Copy) -> None:
        """Cancel a load after LINGER_S, unless a program requests it again, for example after a signal."""
        with trio.move_on_after(LINGER_S):
            await copy.done.wait()
        if copy.unwanted and not copy.done.is_set():
            pool.abandon(copy)

    async def _after_use(self, pool: Pool, copy: Copy) -> None:
        """Free a copy without leases if nobody can lease it again, and the copies that the policy does not keep."""
        await copy.done.wait()
        if copy.leases or copy.checked_by:
            return
        if self._options.gpu_sharing == "none":
            await pool.drop(copy)
        elif not pool.serves(copy):
            await pool.discard(copy)
        await pool.tidy()

    def share(self, lease: Lease, holder: Holder) -> Lease:
        """Make another lease of the same copy, for another holder."""
        return self.pools[lease.copy.device].add_lease(lease.copy, holder)

    def may_share(self, uid: int, other: int) -> bool:
        """Whether two users may use the same copy."""
        return self._options.gpu_sharing == "all" or uid == other

    def handle(self, generation: Generation, device: str, uid: int) -> bytes | None:
        """The IPC handle of a loaded copy that a user may share, without a lease; None if there is no such copy."""
        pool = self.pools.get(device)
        if pool is None or self._options.gpu_sharing == "none":
            return None
        copy = pool.find(self._key(generation, CopyRequest(device, MemoryKind.IPC), self._domain(Holder(uid=uid))))
        return copy.handle if copy is not None and copy.ready else None

    async def _pool(self, device: str) -> Pool:
        await self._searched.wait()
        pool = self.pools.get(device)
        if pool is None:
            reason = self.unavailable or f"this host has {', '.join(self.pools)}"
            raise NoSuchEntryError(f"no device {device}: {reason}")
        return pool

    def _key(self, generation: Generation, request: CopyRequest, domain: str) -> CopyKey:
        token = self._blobs.token(generation)
        return CopyKey(token=token, domain=domain, memory=request.memory.value, pattern=request.pattern)

    def _domain(self, holder: Holder) -> str:
        """The sharing domain of a holder: holders in one domain may share a copy."""
        match self._options.gpu_sharing:
            case "all":
                return "all"
            case "uid":
                return f"uid {holder.uid}"
        return f"lease {secrets.token_hex(8)}"

    async def _layout(self, generation: Generation, pattern: str | None) -> Layout:
        table = await self._tables.tensors(generation)
        if pattern is None:
            return lay_out(table, generation.size)
        tensors = tuple(matching(table.tensors, pattern)) if table is not None else ()
        if table is None or not tensors:
            raise _no_tensor(generation, pattern)
        return lay_out(TensorTable(table.format, tensors, table.named), generation.size)

    # Loading

    def _start_loading(self, pool: Pool, key: CopyKey, generation: Generation, layout: Layout) -> Copy:
        copy = Copy(key=key, device=pool.device.uuid, generation=generation, layout=layout, size=rounded(layout.nbytes))
        pool.add(copy)
        self._background.start(self._load, pool, copy)
        return copy

    async def _load(self, pool: Pool, copy: Copy) -> None:
        await self._loader.load(pool, copy)
        if copy.error is None and not copy.leases:  # all waiting programs have gone
            await self._after_use(pool, copy)

    # Commands

    async def warm(self, generation: Generation, request: CopyRequest, holder: Holder, *, models_only: bool) -> bool:
        """Load a copy for a user ahead of time. Raises as `lease`, and InvalidRequestError.

        With *models_only*, returns False for a file of unknown format, and loads nothing.
        """
        if self._options.gpu_sharing == "none":
            raise InvalidRequestError(
                f"{generation.key}: with gpu_sharing none, each program gets a copy of its own: nothing to load ahead"
            )
        if models_only and await self._tables.tensors(generation) is None:
            return False
        self.release(await self.lease(generation, request, holder))
        return True

    def check_idle(self, generation: Generation) -> None:
        """Check that no copy of any generation of a file is in use. Raises InUseError."""
        for pool in self.pools.values():
            for copy in pool.of_file(generation.file):
                if copy.in_use:
                    raise _in_use(copy)

    async def evict(self, generation: Generation) -> None:
        """Evict the copies of all generations of a file. Raises InUseError when one is in use."""
        for pool in self.pools.values():
            for copy in pool.of_file(generation.file):
                if not await pool.drop(copy):
                    raise _in_use(copy)

    async def compare(self, generation: Generation) -> int:
        """Compare all copies of a generation with the file, byte by byte; returns their number.

        The server stops leasing a copy that differs. Raises CopyDamagedError, and the errors of a read of the file.
        """
        differing: list[str] = []
        compared = 0
        async with self._blobs.inspecting(generation) as blob:
            for pool in self.pools.values():
                async with pool.comparing:  # one at a time: each comparison takes two of the device's staging buffers
                    for copy in pool.of(self._blobs.token(generation)):
                        await copy.done.wait()
                        if copy.memory is None:
                            continue
                        compared += 1
                        if await self._differs(pool, copy, blob):
                            differing.append(copy.device)
        if differing:
            raise CopyDamagedError(
                f"{generation.key}: its copy on {', '.join(differing)} differs from the file, and is no longer leased: "
                "end the programs that use it"
            )
        return compared

    async def _differs(self, pool: Pool, copy: Copy, blob: Blob) -> bool:
        assert copy.memory is not None
        place = None
        copy.checked_by += 1
        try:
            place = await differs(pool.device, copy.memory.address, copy.layout, self._loader.source(blob))
        finally:
            copy.checked_by -= 1
            if place is not None:
                pool.forget(copy)
                self.ledger.let_go(copy)
            if not copy.leases and self._background.running:  # its last lease may have ended meanwhile
                self._background.start(self._after_use, pool, copy)
        if place is not None:
            log.error("/%s: the copy on %s differs from the file at byte %d", copy.generation.key, copy.device, place)
        return place is not None

    def resident(self, generation: Generation) -> dict[str, int]:
        """Bytes of a generation on each device that has any, in all domains."""
        token = self._blobs.token(generation)
        sizes = {uuid: sum(copy.size for copy in pool.of(token) if copy.ready) for uuid, pool in self.pools.items()}
        return {uuid: size for uuid, size in sizes.items() if size}


def _in_use(copy: Copy) -> InUseError:
    holders = {lease.holder for lease in copy.leases}
    users = sorted({shown(one.pid) if one.pid else f"a process of uid {one.uid}" for one in holders})
    who = ", ".join(users) or "the server, which loads or compares it"
    return InUseError(f"{copy.generation.key} is in use on {copy.device} by {who}: evict it once nobody uses it")


def _no_tensor(generation: Generation, pattern: str) -> NoSuchEntryError:
    return NoSuchEntryError(f"{generation.key}: no tensor name matches {pattern}")
