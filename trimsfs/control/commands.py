"""Commands by control file: opening it starts the command, each read tells how far it has come, closing it ends it."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial

import trio

from trimsfs.control.handle import ControlHandle
from trimsfs.errors import BlobDamagedError, CacheUnusableError, InUseError, TrimsError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.gpu.copies import GpuCopies
from trimsfs.gpu.copy_requests import WarmRequest, parse_warm_command
from trimsfs.integrity.integrity import Integrity
from trimsfs.integrity.signature_policy import SignaturePolicy
from trimsfs.models.derived_blobs import DerivedBlobs
from trimsfs.namespace.directory import NonObject
from trimsfs.namespace.inodes import Inode
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.tiers.gpu.pool import Holder
from trimsfs.tiers.host.tier import HostTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.25
FILES_AT_ONCE = 16
RELEASE_CHECKS, RELEASE_INTERVAL_S = 50, 0.01
"""How long an eviction waits for a close that has not been heard of yet, or for what the server itself does."""
VERIFY_GPU = "verify-gpu"


class Progress:
    """How far a command has come: shared by the command, which writes, and its handle, which reads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.done_bytes = 0
        self.total_bytes = 0
        self.total_files = 0
        self.failed_files = 0
        self.left_out_files = 0
        self.compared_copies = 0
        self.arriving: set[Blob] = set()
        self.finished = trio.Event()
        self.error: TrimsError | None = None

    def failed(self, error: TrimsError) -> None:
        """One file has failed; the first tells why."""
        self.failed_files += 1
        self.error = self.error or error

    def line(self) -> bytes:
        state = "running"
        if self.finished.is_set():
            state = "done" if self.error is None else "failed"
        line: dict[str, object] = {
            "path": self.path,
            "state": state,
            "done_bytes": self.done_bytes + sum(blob.verified_bytes for blob in self.arriving),
            "total_bytes": self.total_bytes,
            "total_files": self.total_files,
            "failed_files": self.failed_files,
            "left_out_files": self.left_out_files,
            "compared_copies": self.compared_copies,
        }
        if self.error is not None:
            line |= {"error": str(self.error), "kind": type(self.error).__name__}
        return as_json(line)


class RunningCommand:
    """A running command. Reads block for a moment at most, so a reader can always be interrupted."""

    def __init__(self, progress: Progress, scope: trio.CancelScope) -> None:
        self._progress = progress
        self._scope = scope
        self._text = b""
        self._last = False

    async def read(self, offset: int, size: int) -> bytes:
        if offset >= len(self._text) and not self._last:
            if self._text:
                with trio.move_on_after(PROGRESS_INTERVAL_S):
                    await self._progress.finished.wait()
            self._last = self._progress.finished.is_set()
            self._text += self._progress.line()
        return self._text[offset : offset + size]

    def close(self) -> None:
        self._scope.cancel()


Command = Callable[[Generation, Progress], Awaitable[None]]
"""Does something about one file. Raises TrimsError."""


class Commands:
    """Carries out commands on files, and on all below a directory."""

    def __init__(
        self,
        namespace: Namespace,
        disk: DiskTier,
        host: HostTier,
        fetcher: Fetcher,
        passthrough: Passthrough,
        derived: DerivedBlobs,
        gpu: GpuCopies,
        integrity: Integrity,
        signature_policy: SignaturePolicy | None,
    ) -> None:
        self._namespace = namespace
        self._disk = disk
        self._host = host
        self._fetcher = fetcher
        self._passthrough = passthrough
        self._derived = derived
        self._gpu = gpu
        self._integrity = integrity
        self._signature_policy = signature_policy
        self._nursery: trio.Nursery | None = None
        self._pins = trio.Lock()
        self._commands: dict[str, Command] = {
            "evict": self._evict,
            "pin": self._pin,
            "unpin": self._unpin,
            "verify": self._verify,
            VERIFY_GPU: self._verify_gpu,
            "warm-disk": self._warm_disk,
            "warm-host": self._warm_host,
        }

    def names(self) -> list[str]:
        """The names of the commands; those about GPUs where there are any."""
        devices = self._gpu.pools
        always = [name for name in self._commands if name != VERIFY_GPU or devices]
        return [*always, *(f"warm-{device}" for device in devices)]

    def knows(self, name: str) -> bool:
        """Whether there is such a command."""
        return name in self._commands or parse_warm_command(name) is not None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry commands, for as long as the server runs."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._restore_pins()
            await trio.sleep_forever()

    async def _restore_pins(self) -> None:
        """Have what was pinned before the server started in memory again."""
        try:
            found = await self._disk.residencies()
        except TrimsError as error:
            log.error("what is pinned is not known: %s", error)
            return
        for here in found:
            if here.pinned:
                try:
                    await self._pin(here.generation, Progress(here.generation.key), again=True)
                except TrimsError as error:
                    log.warning("%s is pinned, but not all here: %s", here.generation.key, error)

    def start(self, name: str, inode: Inode, uid: int) -> ControlHandle:
        """Begin a command, for the user of this number."""
        assert self._nursery is not None
        log.info("%s /%s", name, inode.path)
        progress = Progress(inode.path)
        scope = trio.CancelScope()
        asked = parse_warm_command(name)
        command = (
            self._commands[name] if asked is None else partial(self._warm_gpu, asked, uid, inode.generation is None)
        )
        self._nursery.start_soon(self._carry, command, inode, progress, scope)
        return RunningCommand(progress, scope)

    async def _carry(self, command: Command, inode: Inode, progress: Progress, scope: trio.CancelScope) -> None:
        """Give a command for everything below an inode; what fails does not keep the rest from being done."""
        slots = trio.Semaphore(FILES_AT_ONCE)
        try:
            with scope:
                concerned = self._pinned if command == self._unpin else self._below
                generations = [generation async for generation in concerned(inode)]
                progress.total_files = len(generations)
                progress.total_bytes = sum(generation.size for generation in generations)
                async with trio.open_nursery() as nursery:
                    for generation in generations:
                        await slots.acquire()
                        nursery.start_soon(self._carry_one, command, generation, progress, slots)
        except TrimsError as error:
            progress.error = error
        except Exception as error:  # a defect: it ends this command, not the server
            log.exception("/%s", inode.path)
            progress.error = CacheUnusableError(f"{inode.path}: internal error: {error!r}")
        finally:
            progress.finished.set()

    async def _carry_one(
        self, command: Command, generation: Generation, progress: Progress, slots: trio.Semaphore
    ) -> None:
        try:
            await command(generation, progress)
            progress.done_bytes += generation.size
        except TrimsError as error:
            progress.failed(error)
        except Exception as error:  # a defect: it ends this command, not the server
            log.exception("/%s", generation.key)
            progress.failed(CacheUnusableError(f"{generation.key}: internal error: {error!r}"))
        finally:
            slots.release()

    async def _below(self, inode: Inode) -> AsyncIterator[Generation]:
        """The generation that an inode is about, or all those below a directory."""
        if inode.generation is not None:
            yield inode.generation
            return
        prefixes = [inode.path]
        while prefixes:
            prefix = prefixes.pop()
            for name, entry in (await self._namespace.entries(prefix)).items():
                if isinstance(entry, Generation):
                    yield entry
                elif entry is NonObject.DIRECTORY:
                    prefixes.append(f"{prefix}{name.decode(errors='surrogateescape')}/")

    async def _pinned(self, inode: Inode) -> AsyncIterator[Generation]:
        """What is pinned under a name or below it, also what the store has replaced or deleted since."""
        name = inode.path.removesuffix("/")
        for here in await self._disk.residencies():
            key = here.generation.key
            if here.pinned and (not name or key == name or key.startswith(f"{name}/")):
                yield here.generation

    async def _warm_disk(self, generation: Generation, progress: Progress) -> None:
        async with self._arriving(generation, progress) as blob:
            await self._fetch(blob)

    async def _warm_host(self, generation: Generation, progress: Progress) -> None:
        async with self._arriving(generation, progress) as blob:
            await self._fetch(blob)
            await self._in_memory(partial(self._host.load, again=True), blob)
            await self._passthrough.register(blob)

    async def _fetch(self, blob: Blob) -> None:
        await self._admit(blob)
        await self._fetcher.fetch_all(blob)
        blob.health.check()

    async def _admit(self, blob: Blob) -> None:
        """Raises SignatureError for what nobody could open."""
        if self._signature_policy is not None:
            await self._signature_policy.admit(blob, nullcontext)

    async def _in_memory(self, function: Callable[[Blob], Awaitable[None]], blob: Blob) -> None:
        if not blob.attached:
            return  # it is empty
        try:
            await function(blob)
        except OSError as error:
            raise CacheUnusableError(f"{blob.generation.key}: cannot be read from the cache: {error}") from error

    async def _pin(self, generation: Generation, progress: Progress, *, again: bool = False) -> None:
        """Pin a file, *again* if it has not been unpinned meanwhile."""
        async with self._arriving(generation, progress) as blob:
            await self._fetch(blob)
            await self._in_memory(partial(self._host.load, again=True), blob)
            async with self._pinning():
                if again and not blob.pinned:
                    return
                await self._in_memory(self._host.pin, blob)
                try:
                    await self._disk.pin(blob, True)
                except BaseException:
                    if not blob.pinned:
                        await self._host.unpin(blob)
                    raise
            await self._passthrough.register(blob)

    @asynccontextmanager
    async def _pinning(self) -> AsyncIterator[None]:
        """One at a time, and to its end: what is locked in memory is what is pinned."""
        async with self._pins:
            with trio.CancelScope(shield=True):
                yield

    @asynccontextmanager
    async def _arriving(self, generation: Generation, progress: Progress) -> AsyncIterator[Blob]:
        """The blob of a generation, whose arrival counts as progress for the length of the block."""
        async with self._disk.using(generation) as blob:
            progress.arriving.add(blob)
            try:
                yield blob
            finally:
                progress.arriving.discard(blob)

    async def _unpin(self, generation: Generation, progress: Progress) -> None:
        del progress
        async with self._disk.using(generation) as blob, self._pinning():
            await self._disk.pin(blob, False)
            await self._host.unpin(blob)

    async def _evict(self, generation: Generation, progress: Progress) -> None:
        del progress
        for _ in range(RELEASE_CHECKS):
            here = await self._disk.residency(generation)
            if here.users == 0 or here.pinned:
                break
            await trio.sleep(RELEASE_INTERVAL_S)
        self._gpu.check_idle(generation)
        await self._disk.evict(generation)
        await self._gpu.evict(generation)
        for derived in await self._derived.of(generation):
            with suppress(InUseError):  # its programs go on; it is evicted as others are
                await self._disk.evict(derived)

    async def _warm_gpu(
        self, asked: WarmRequest, uid: int, models_only: bool, generation: Generation, progress: Progress
    ) -> None:
        holder = Holder(uid=uid if asked.uid is None else asked.uid)
        async with self._arriving(generation, progress) as blob:
            await self._admit(blob)
            if not await self._gpu.warm(generation, asked.request, holder, models_only=models_only):
                progress.left_out_files += 1

    async def _verify(self, generation: Generation, progress: Progress) -> None:
        del progress
        damaged = await self._integrity.verify(generation)
        if damaged:
            raise BlobDamagedError(f"{generation.key}: damaged chunks of its local copy, fetched again: {damaged}")

    async def _verify_gpu(self, generation: Generation, progress: Progress) -> None:
        compared = await self._gpu.compare(generation)  # others count meanwhile
        progress.compared_copies += compared


def as_json(value: object) -> bytes:
    """A line of a control file."""
    return json.dumps(value).encode() + b"\n"
