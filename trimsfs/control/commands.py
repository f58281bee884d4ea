"""Commands by control file: opening it starts the command, each read tells how far it has come, closing it ends it."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import trio

from trimsfs.control.actions import Actions
from trimsfs.control.handle import ControlHandle
from trimsfs.control.progress import Progress, RunningCommand
from trimsfs.errors import CacheUnusableError, TrimsError
from trimsfs.gpu.copy_requests import parse_warm_command
from trimsfs.namespace.directory import NonObject
from trimsfs.namespace.inodes import Inode
from trimsfs.namespace.tree import Namespace
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

FILES_AT_ONCE = 16
VERIFY_GPU = "verify-gpu"


Command = Callable[[Generation, Progress], Awaitable[None]]
"""Does something about one file. Raises TrimsError."""


class Commands:
    """Carries out commands on files, and on all below a directory."""

    def __init__(self, namespace: Namespace, disk: DiskTier, actions: Actions) -> None:
        self._namespace = namespace
        self._disk = disk
        self._actions = actions
        self._nursery: trio.Nursery | None = None
        self._commands: dict[str, Command] = {
            "evict": actions.evict,
            "pin": actions.pin,
            "unpin": actions.unpin,
            "verify": actions.verify,
            VERIFY_GPU: actions.verify_gpu,
            "warm-disk": actions.warm_disk,
            "warm-host": actions.warm_host,
        }

    def names(self) -> list[str]:
        """The names of the commands; those about GPUs where there are any."""
        devices = self._actions.devices()
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
            await self._actions.restore_pins()
            await trio.sleep_forever()

    def start(self, name: str, inode: Inode, uid: int) -> ControlHandle:
        """Begin a command, for the user of this number."""
        assert self._nursery is not None
        log.info("%s /%s", name, inode.path)
        progress = Progress(inode.path)
        scope = trio.CancelScope()
        request = parse_warm_command(name)
        if request is None:
            command = self._commands[name]
        else:
            command = partial(self._actions.warm_gpu, request, uid, inode.generation is None)
        self._nursery.start_soon(self._carry, command, inode, progress, scope)
        return RunningCommand(progress, scope)

    async def _carry(self, command: Command, inode: Inode, progress: Progress, scope: trio.CancelScope) -> None:
        """Give a command for everything below an inode; what fails does not keep the rest from being done."""
        slots = trio.Semaphore(FILES_AT_ONCE)
        try:
            with scope:
                concerned = self._pinned if command == self._actions.unpin else self._below
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
            if progress.error is not None:
                log.warning("/%s: %s", inode.path, progress.error)
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
