"""The control surface: extended attributes and control files, by name.

Reading an attribute or an ``info`` file only looks. A command file acts: opening it starts the command, each
read gives the next line of JSON on how far it has come, closing it ends the command. So a command dies with the
process that gave it, and needs nothing but the path.
"""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import trio

from trimsfs.access import Access
from trimsfs.derived import DerivedBlobs, owner
from trimsfs.errors import CacheUnusableError, InUseError, NotPermittedError, TrimsError
from trimsfs.fetch import Fetcher
from trimsfs.handles import ControlHandle
from trimsfs.namespace import CONTROL_NAME, Inode, Kind, Namespace, Special
from trimsfs.options import MountOptions
from trimsfs.residents import Residents
from trimsfs.tables import TensorTables
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk import DiskTier
from trimsfs.tiers.host import HostTier
from trimsfs.tiers.residency import Residency
from trimsfs.tiers.sharing import Sharing
from trimsfs.types import Generation

log = logging.getLogger(__name__)

XATTR_PREFIX = "user.trims."
XATTR_LIMIT = 65536
"""Bytes of the longest value that the kernel passes on."""
PROGRESS_INTERVAL_S = 0.25
FILES_AT_ONCE = 16
RELEASE_CHECKS, RELEASE_INTERVAL_S = 50, 0.01
"""How long an eviction waits for a close that has not been heard of yet, or for what the server itself does."""
CONTROL_PART = f"{CONTROL_NAME.decode()}/"
SUBJECT = "subject"
"""Marks the inode of ``.trims/NAME``, as against ``.trims`` itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who opened a control file: ids as the host sees them."""

    uid: int
    groups: frozenset[int]


class _Text:
    """A control file whose content is made when it is opened."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    def close(self) -> None:
        """Nothing goes on."""


class _Progress:
    """How far a command has come: shared by the command, which writes, and its handle, which reads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.done_bytes = 0
        self.total_bytes = 0
        self.total_files = 0
        self.failed_files = 0
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
        }
        if self.error is not None:
            line |= {"error": str(self.error), "kind": type(self.error).__name__}
        return _json(line)


class _Command:
    """A running command. Reads block for a moment at most, so a reader can always be interrupted."""

    def __init__(self, progress: _Progress, scope: trio.CancelScope) -> None:
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


Command = Callable[[Generation, _Progress], Awaitable[None]]


class Control:
    """Answers for everything under ``.trims`` and ``user.trims.*``."""

    def __init__(
        self,
        namespace: Namespace,
        disk: DiskTier,
        host: HostTier,
        fetcher: Fetcher,
        residents: Residents,
        tables: TensorTables,
        derived: DerivedBlobs,
        sharing: Sharing,
        options: MountOptions,
        *,
        metrics: Callable[[], bytes],
        facts: Callable[[], dict[str, object]],
    ) -> None:
        self._namespace = namespace
        self._disk = disk
        self._host = host
        self._fetcher = fetcher
        self._residents = residents
        self._tables = tables
        self._derived = derived
        self._sharing = sharing
        self.access = Access(options)
        self._options = options
        self._metrics = metrics
        self._facts = facts
        self._nursery: trio.Nursery | None = None
        self._root_files: dict[str, Callable[[Caller], Awaitable[bytes]]] = {
            "control": self._control,
            "metrics": self._render_metrics,
            "models": partial(self._models, ""),
        }
        self._commands: dict[str, Command] = {
            "evict": self._evict,
            "pin": self._pin,
            "unpin": self._unpin,
            "warm-disk": self._warm_disk,
            "warm-host": self._warm_host,
        }
        # At once, without a look at what is here.
        self._identity_xattrs: dict[str, Callable[[Generation], str]] = {
            "etag": lambda generation: generation.etag,
            "generation": lambda generation: generation.token(disk.store),
        }
        self._xattrs: dict[str, Callable[[Residency], str]] = {
            "pinned": lambda here: _boolean(here.pinned),
            "residency": lambda here: json.dumps(_residency(here)),
            "verified": lambda here: _boolean(here.verified),
        }

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry commands, for as long as the server runs."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._restore_pins()
            await trio.sleep_forever()

    async def _restore_pins(self) -> None:
        """Have what was pinned before the server started in memory again."""
        for here in await self._disk.residencies():
            if here.pinned:
                try:
                    await self._pin(here.generation, _Progress(here.generation.key))
                except TrimsError as error:
                    log.warning("%s is pinned, but not all here: %s", here.generation.key, error)

    @property
    def tells_common(self) -> bool:
        """Whether there are files that tell what a model has in common with another."""
        return self._options.share_chunks

    def names(self, inode: Inode) -> list[str]:
        """The names of the control files in a control directory."""
        if inode.control == SUBJECT:
            looks = ["info"] if inode.generation is None else ["info", "tensors"]
            if self.tells_common and inode.generation is not None:
                looks.append("shared")
            return sorted([*looks, *self._commands])
        return sorted(self._root_files) if not inode.path else []

    def xattr_names(self, inode: Inode) -> list[str]:
        """The full names of an inode's attributes."""
        names = [*self._identity_xattrs, *self._xattrs]
        return [XATTR_PREFIX + name for name in names] if inode.kind is Kind.OBJECT else []

    async def xattr(self, inode: Inode, name: str) -> bytes | None:
        """The value of an attribute by its full name; None when there is no such attribute.

        That of the tensor table, which may have to be fetched, is not among the `xattr_names`.
        """
        generation, short = inode.generation, name.removeprefix(XATTR_PREFIX)
        if short == name or generation is None or inode.kind is not Kind.OBJECT:
            return None
        if short == "tensors":
            table = await self._tables.table(generation)
            return table if len(table) <= XATTR_LIMIT else None
        if short in self._identity_xattrs:
            return self._identity_xattrs[short](generation).encode()
        if short in self._xattrs:
            return self._xattrs[short](await self._disk.residency(generation)).encode()
        return None

    async def open(self, inode: Inode, caller: Caller) -> ControlHandle:
        """Open a control file. Raises NotPermittedError when it is a command that the caller may not give."""
        name = inode.control
        if name in self._commands:
            self._authorise(caller, name, inode.path)
            return self._start(name, inode)
        if name == "info":
            return _Text(await self._info(inode, caller))
        if name == "tensors":
            assert inode.generation is not None
            return _Text(await self._tables.table(inode.generation))
        if name == "shared":
            assert inode.generation is not None
            return _Text(_json(await self._sharing.told(inode.generation, partial(self._may_tell, caller, inode.path))))
        return _Text(await self._root_files[name](caller))

    def _authorise(self, caller: Caller, command: str, path: str) -> None:
        if not self._commands_allowed(caller):
            raise NotPermittedError(f"{command} /{path}: uid {caller.uid} may not command this mount")

    def _commands_allowed(self, caller: Caller) -> bool:
        return caller.uid in {0, self._options.uid} or self._options.control_gid in caller.groups

    def _start(self, name: str, inode: Inode) -> ControlHandle:
        assert self._nursery is not None
        log.info("%s /%s", name, inode.path)
        progress = _Progress(inode.path)
        scope = trio.CancelScope()
        self._nursery.start_soon(self._carry, name, inode, progress, scope)
        return _Command(progress, scope)

    async def _carry(self, name: str, inode: Inode, progress: _Progress, scope: trio.CancelScope) -> None:
        """Give a command for everything below an inode; what fails does not keep the rest from being done."""
        slots = trio.Semaphore(FILES_AT_ONCE)
        try:
            with scope:
                generations = [generation async for generation in self._below(inode)]
                progress.total_files = len(generations)
                progress.total_bytes = sum(generation.size for generation in generations)
                async with trio.open_nursery() as nursery:
                    for generation in generations:
                        await slots.acquire()
                        nursery.start_soon(self._carry_one, self._commands[name], generation, progress, slots)
        except TrimsError as error:
            progress.error = error
        finally:
            progress.finished.set()

    async def _carry_one(
        self, command: Command, generation: Generation, progress: _Progress, slots: trio.Semaphore
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
                elif entry is Special.DIRECTORY:
                    prefixes.append(f"{prefix}{name.decode(errors='surrogateescape')}/")

    # Commands

    async def _warm_disk(self, generation: Generation, progress: _Progress) -> None:
        async with self._arriving(generation, progress) as blob:
            await self._fetcher.fetch_all(blob)

    async def _warm_host(self, generation: Generation, progress: _Progress) -> None:
        async with self._arriving(generation, progress) as blob:
            await self._fetcher.fetch_all(blob)
            await self._in_memory(partial(self._host.bring, again=True), blob)
            await self._residents.announce(blob)

    async def _in_memory(self, function: Callable[[Blob], Awaitable[None]], blob: Blob) -> None:
        if not blob.attached:
            return  # it is empty
        try:
            await function(blob)
        except OSError as error:
            raise CacheUnusableError(f"{blob.generation.key}: cannot be read from the cache: {error}") from error

    async def _pin(self, generation: Generation, progress: _Progress) -> None:
        async with self._arriving(generation, progress) as blob:
            before = blob.pinned
            await self._disk.pin(blob, True)
            try:
                await self._fetcher.fetch_all(blob)
                await self._in_memory(self._host.pin, blob)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._disk.pin(blob, before)
                raise
            await self._residents.announce(blob)

    @asynccontextmanager
    async def _arriving(self, generation: Generation, progress: _Progress) -> AsyncIterator[Blob]:
        """The blob of a generation, whose arrival counts as progress for the length of the block."""
        async with self._disk.using(generation) as blob:
            progress.arriving.add(blob)
            try:
                yield blob
            finally:
                progress.arriving.discard(blob)

    async def _unpin(self, generation: Generation, progress: _Progress) -> None:
        del progress
        async with self._disk.using(generation) as blob:
            await self._disk.pin(blob, False)
            await self._host.unpin(blob)

    async def _evict(self, generation: Generation, progress: _Progress) -> None:
        del progress
        for _ in range(RELEASE_CHECKS):
            here = await self._disk.residency(generation)
            if here.users == 0 or here.pinned:
                break
            await trio.sleep(RELEASE_INTERVAL_S)
        await self._disk.evict(generation)
        for derived in await self._derived.of(generation):
            with suppress(InUseError):  # its programs go on; it is evicted as others are
                await self._disk.evict(derived)

    # Looking

    async def _info(self, inode: Inode, caller: Caller) -> bytes:
        if inode.generation is not None:
            return _json(self._model(await self._disk.residency(inode.generation)))
        return await self._models(inode.path, caller)

    async def _models(self, prefix: str, caller: Caller) -> bytes:
        """What is here of the objects below a prefix that the caller may read; of the others nothing is told."""
        below = [
            here
            for here in await self._disk.residencies()
            if here.generation.key.startswith(prefix) and self._may_read(here.generation.key, caller)
        ]
        return _json({"path": prefix, "models": [self._model(here) for here in below]})

    def _may_read(self, key: str, caller: Caller) -> bool:
        made_by = owner(key.rpartition("/")[2]) if CONTROL_PART in key else None
        if made_by is not None and caller.uid not in {0, made_by}:
            return False
        return self.access.may_read(key, caller.uid, caller.groups)

    def _may_tell(self, caller: Caller, asked: str, blob: Blob) -> bool:
        """Whether a caller may learn of a blob that is ready to be mapped; a container's root may read all, but of a
        tenant's model only who uses another of that tenant is told."""
        key = blob.generation.key
        known = self.access.tenant(key) in {None, self.access.tenant(asked)}
        return known and self._residents.ready(blob) and self._may_read(key, caller)

    async def _render_metrics(self, caller: Caller) -> bytes:
        text = self._metrics()
        if not self._commands_allowed(caller):
            text = b"".join(line for line in text.splitlines(keepends=True) if b'{tenant="' not in line)
        return text

    async def _control(self, caller: Caller) -> bytes:
        facts = self._facts()
        if not self._commands_allowed(caller):
            facts = {name: fact for name, fact in facts.items() if name != "options"}  # it names tenants
        return _json(facts)

    def _model(self, here: Residency) -> dict[str, object]:
        generation = here.generation
        return {
            "path": generation.key.encode(errors="surrogateescape").decode(errors="replace"),
            "size": generation.size,
            "generation": here.token,
            "etag": generation.etag,
            "version_id": generation.version_id,
            "modified": generation.modified_ns / 1e9,
            "residency": _residency(here),
            "verified": here.verified,
            "passthrough": self._residents.has(generation),
            "pinned": here.pinned,
            "open": here.users,
            "uses": here.uses,
            "last_used": here.last_used or None,
        }


def _residency(here: Residency) -> dict[str, int | None]:
    return {"disk": here.disk_bytes, "host": here.host_bytes}


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _json(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
