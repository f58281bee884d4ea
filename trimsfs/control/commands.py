"""Commands by control file: an open starts the command, each read returns its progress, a close cancels it.

A job goes on after the file that started it is closed.
"""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from trimsfs.control.actions import Actions
from trimsfs.control.authorisation import CONTROL_PART
from trimsfs.control.extra import Command, Extra
from trimsfs.control.handle import ControlHandle, Text, as_json
from trimsfs.control.jobs import Job, Jobs, Order
from trimsfs.control.progress import Progress, RunningCommand
from trimsfs.errors import CacheUnusableError, InvalidRequestError, StoreError, TrimsError
from trimsfs.handover.ledger import Ledger
from trimsfs.namespace.inodes import Inode
from trimsfs.namespace.listing import SLICE, NonObject
from trimsfs.namespace.tree import Namespace
from trimsfs.origins import ByPath, by_path
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.tiers.disk.interfaces import KnownBlobs, Residencies
from trimsfs.types import Generation, Symlink

log = logging.getLogger(__name__)

T = TypeVar("T")

FILES_AT_ONCE = 16
BACKGROUND = "background-"
"""The prefix of a command's name that makes it a job."""


class Commands:
    """Carries out commands on a file, or on all files below a directory."""

    def __init__(
        self,
        namespace: Namespace,
        blobs: KnownBlobs,
        residencies: Residencies,
        actions: Actions,
        breaker: CircuitBreaker | ByPath[CircuitBreaker],
        ledger: Ledger,
        extras: Sequence[Extra],
    ) -> None:
        self._namespace = namespace
        self._blobs = blobs
        self._residencies = residencies
        self._actions = actions
        self._breakers = by_path(breaker)
        self.jobs = Jobs(ledger, partial(self._outage, patient=True))
        self._nursery: trio.Nursery | None = None
        self._commands: dict[str, Command] = {
            "evict": actions.evict,
            "pin": actions.pin,
            "unpin": actions.unpin,
            "verify": actions.verify,
            "warm-disk": actions.warm_disk,
            "warm-host": actions.warm_host,
        }
        self._extras = extras

    def names(self) -> list[str]:
        """The names of the commands."""
        return [*self._commands, *(name for extra in self._extras for name in extra.command_names())]

    def knows(self, name: str) -> bool:
        """Whether there is such a command."""
        command = name.removeprefix(BACKGROUND)
        known = command in self._commands or any(extra.knows_command(command) for extra in self._extras)
        return known and (command == name or command.startswith(("pin", "warm-")))

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run commands, and the unfinished jobs of the previous server, until the server stops."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for job in self.jobs.under_way():
                nursery.start_soon(self._carry_job, job)
            task_status.started()
            await self._actions.restore_pins()
            await trio.sleep_forever()

    def start(self, name: str, inode: Inode, uid: int) -> ControlHandle:
        """Start a user's command; the handle of its control file."""
        assert self._nursery is not None
        log.info("%s /%s", name, inode.path)
        command = name.removeprefix(BACKGROUND)
        order = Order(name=command, path=inode.path, generation=inode.generation, uid=uid)
        if command != name:
            job = self.jobs.add(order)
            self._nursery.start_soon(self._carry_job, job)
            return Text(as_json(job.facts()))
        progress = Progress(inode.path, partial(self._outage, inode.path, patient=False))
        scope = trio.CancelScope()
        self._nursery.start_soon(self._carry, order, progress, scope)
        return RunningCommand(progress, scope)

    def _outage(self, path: str, *, patient: bool) -> str | None:
        """Why a command on a path waits for a store; None if all answer. A *patient* command has no deadline."""
        away = next((breaker for breaker in self._breakers.near(path) if breaker.outage is not None), None)
        if away is None or away.outage is None:
            return None
        (lasted_s, why), deadline_s = away.outage, away.deadline_s
        lasted = f"{lasted_s:.0f} s" if patient else f"{min(lasted_s, deadline_s):.0f} s of {deadline_s:.0f} s"
        return f"the store does not answer, waiting ({lasted}): {why}"

    async def _carry_job(self, job: Job) -> None:
        await self._carry(job.order, job.progress, job.scope)
        # Not reached if the server stops: the next one continues the job.
        self.jobs.end(job)
        log.info("job %s: %s /%s: %s", job.id, job.order.name, job.order.path, job.facts()["state"])

    async def cancel(self, job: Job) -> ControlHandle:
        """Cancel a job; its final state."""
        job.scope.cancel()
        await job.over.wait()
        return Text(as_json(job.facts()))

    async def _carry(self, order: Order, progress: Progress, scope: trio.CancelScope) -> None:
        """Run a command on all of its files; one that fails does not stop the others."""
        slots = trio.Semaphore(FILES_AT_ONCE)
        try:
            with scope:
                command = self._command(order)
                concern = self._pinned if order.name == "unpin" else self._below
                concerned, failures = await concern(order, progress)
                for failure in failures:
                    progress.failed(failure)
                # Several links may lead to one content.
                generations = list({(each.file, each.etag): each for each in concerned}.values())
                progress.total_files = len(generations)
                progress.total_bytes = sum(generation.size for generation in generations)
                async with trio.open_nursery() as nursery:
                    for generation in generations:
                        await slots.acquire()
                        nursery.start_soon(self._carry_one, command, generation, progress, slots)
            progress.cancelled = scope.cancelled_caught
        except TrimsError as error:
            progress.error = error
        except Exception as error:  # a defect: it ends this command, not the server
            log.exception("/%s", order.path)
            progress.error = CacheUnusableError(f"{order.path}: internal error: {error!r}")
        finally:
            if progress.error is not None:
                log.warning("/%s: %s", order.path, progress.error)
            progress.finished.set()

    def _command(self, order: Order) -> Command:
        if order.name in self._commands:
            return self._commands[order.name]
        for extra in self._extras:
            command = extra.command(order, self._actions.admitted)
            if command is not None:
                return command
        # A job of an earlier server, whose mount had an extra that this one has not.
        raise InvalidRequestError(f"{order.name}: this mount has no such command")

    async def _outlasting(self, progress: Progress, key: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of *attempt*, which a patient command repeats after an outage of the store that a key is in."""
        return await (self._breakers.of(key).outlast(attempt) if progress.patient else attempt())

    async def _carry_one(
        self, command: Command, generation: Generation, progress: Progress, slots: trio.Semaphore
    ) -> None:
        try:
            await self._outlasting(progress, generation.key, partial(command, generation, progress))
            progress.done_bytes += generation.size
        except TrimsError as error:
            progress.failed(error, generation.key)
        except Exception as error:  # a defect: it ends this command, not the server
            log.exception("/%s", generation.key)
            progress.failed(CacheUnusableError(f"{generation.key}: internal error: {error!r}"), generation.key)
        finally:
            slots.release()

    async def _below(self, order: Order, progress: Progress) -> tuple[list[Generation], list[TrimsError]]:
        """The command's file, or all files below its directory or linked there, and the errors of the names there."""
        if order.generation is not None:
            return [order.generation], []
        generations, failures, prefixes = dict[str, Generation](), list[TrimsError](), [order.path]
        while prefixes:
            prefix = prefixes.pop()
            try:
                listing = await self._outlasting(progress, prefix, partial(self._namespace.entries, prefix))
            except StoreError as error:
                if order.name == "evict":  # what is here is removed without the store
                    generations |= await self._cached(prefix)
                    continue
                if self._breakers.of(prefix) is self._breakers.of(order.path):
                    raise
                failures.append(error)  # another store than others below the path
                continue
            for place, (name, entry) in enumerate(listing.items(), 1):
                if place % SLICE == 0:
                    await trio.lowlevel.checkpoint()
                if isinstance(entry, Generation):
                    generations[entry.key] = entry
                elif entry is NonObject.DIRECTORY:
                    prefixes.append(f"{prefix}{name.decode(errors='surrogateescape')}/")
                else:
                    path = entry.leads_to if isinstance(entry, Symlink) else prefix + os.fsdecode(name)
                    try:
                        generations |= await self._linked(path or "")
                    except TrimsError as error:
                        here = await self._cached(path or "", exactly=True) if order.name == "evict" else {}
                        generations |= here
                        failures += [] if here else [error]
        return list(generations.values()), failures

    async def _linked(self, path: str) -> dict[str, Generation]:
        """The file at a path, by its key; none if that is no file."""
        above, slash, last = path.rpartition("/")
        linked, _ = await self._namespace.lookup(above + slash, os.fsencode(last))
        return {linked.key: linked} if isinstance(linked, Generation) else {}

    async def _cached(self, prefix: str, *, exactly: bool = False) -> dict[str, Generation]:
        """What is cached below a prefix, or of this key *exactly*. Derived blobs go with their models."""
        keys = {here.generation.key: here.generation for here in await self._residencies.all()}
        return {
            key: generation
            for key, generation in keys.items()
            if CONTROL_PART not in key and (key == prefix if exactly else key.startswith(prefix))
        }

    async def _pinned(self, order: Order, progress: Progress) -> tuple[list[Generation], list[TrimsError]]:
        """The pinned files at a path or below, and the pinned targets of links there; the errors of unreadable names.

        Includes files that the store has replaced or deleted since.
        """
        name = order.path.removesuffix("/")
        generations, failures, elsewhere = list[Generation](), list[TrimsError](), set[str]()
        for here in await self._residencies.all():
            key = here.generation.key
            if here.pinned and (not name or key == name or key.startswith(f"{name}/")):
                generations.append(here.generation)
            elif here.pinned:
                elsewhere.add(here.token)
        if elsewhere and self._namespace.has_links:
            try:
                below, failures = await self._below(order, progress)
                generations += [each for each in below if self._blobs.token(each) in elsewhere]
            except StoreError as error:
                failures.append(error)  # links there may lead to pinned files
        return generations, failures
