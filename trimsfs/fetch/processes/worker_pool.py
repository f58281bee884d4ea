"""The server's side of fetch processes: gives them jobs, takes their answers, and replaces those that die or hang.

Jobs of such a process fail, and their callers try again, in another one.
"""

import contextlib
import itertools
import logging
import math
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import trio

from trimsfs import errors
from trimsfs.concurrency.channel import Channel, ChannelClosedError, Message
from trimsfs.errors import StoreUnavailableError, WorkerLostError
from trimsfs.fetch.copier import Arrived, Extent, Landed, LocalBytes
from trimsfs.fetch.flights import Priority
from trimsfs.fetch.peers import PeerAnswer, PeerRequest
from trimsfs.fetch.processes.workers import MOST_TRIES, TRY_AGAIN_S, Role, Spawner, give_priority
from trimsfs.processes import LOOK_INTERVAL_S, StopWatch
from trimsfs.stores.digests import Algorithm
from trimsfs.telemetry.open_trace import Spent
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

LINGER_S: dict[Role, float] = {"fetch": 30.0, "background": 30.0, "digest": 5.0}
"""How long a process waits for its next job before it ends."""
SILENT_S: dict[Role, float] = {"fetch": 25.0, "background": 25.0, "digest": 600.0}
"""How long a process may leave a question unanswered. One for idle time may have to wait for processor time."""
MOST_NOT_STARTED = 2
"""Processes in a row that the spawner does not start before it is given up: it may only be slow."""
_GENERATION = tuple(each.name for each in fields(Generation))


@dataclass(slots=True, eq=False)
class _Job:
    landed: Landed | None = None
    arrived: Arrived | None = None
    done: trio.Event = field(default_factory=trio.Event)
    answer: Message = field(default_factory=dict)


class _Worker:
    """A fetch process.

    ``cancelled`` are the jobs that nobody waits for and for which it may still write. ``lifted`` are those in the
    background for which a program waits by now. ``pid`` is None until the spawner has forked it, ``ordered_at`` when
    the pool asked for it. It is ``ready`` once it has the priority that it begins with. ``asked_s`` says for how long
    it has left a question unanswered, and ``idle_since`` when its last job ended. Once it is closed, ``lost`` says why
    its jobs fail.
    """

    def __init__(self, end: socket.socket) -> None:
        self.channel = Channel(end)
        self.jobs: dict[int, _Job] = {}
        self.cancelled = set[int]()
        self.lifted = set[int]()
        self.sending = trio.Lock()
        self.asked_s = 0.0
        self.ordered_at = self.idle_since = trio.current_time()
        self.pid: int | None = None
        self.ready = False
        self.stop_watch = StopWatch()
        self.lost = "the fetch process died"

    def close(self) -> None:
        """Give the process up: it ends once it sees that, and its jobs fail."""
        self.channel.close()
        for job in self.jobs.values():
            job.answer = {"error": WorkerLostError.__name__, "text": self.lost}
            job.done.set()


class WorkerPool:
    """A `Copier` that has up to *count* fetch processes do the work. Each starts when the pool needs it, and ends when
    the pool no longer does.

    One that does not answer is killed. ``died`` counts those, and those that died by themselves.
    """

    def __init__(self, spawner: Spawner, *, count: int) -> None:
        self._spawner = spawner
        self._most: dict[Role, int] = {"fetch": count, "background": count, "digest": 1}
        self._workers: dict[Role, list[_Worker]] = {role: [] for role in self._most}
        self._numbers = itertools.count()
        self._nursery: trio.Nursery | None = None
        self._not_started, self._missed_at = 0, -math.inf
        self.died = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive the answers of the fetch processes, for as long as the server runs.

        Raises StoreUnavailableError once the spawner has ended.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await self._spawner.watch()
            finally:
                self._nursery = None  # no job is given any more

    async def fetch(
        self,
        generation: Generation,
        extent: Extent,
        landed: Landed,
        arrived: Arrived | None = None,
        *,
        eager: bool = False,
        spent: Spent | None = None,
        priority: Priority | None = None,
    ) -> str | None:
        message = {
            "do": "fetch",
            "generation": {name: getattr(generation, name) for name in _GENERATION},
            **_place(extent),
            "arrived": arrived is not None,
            "eager": eager,
        }
        job = _Job(landed, arrived)
        version: str | None = await self._give(message, [extent.descriptor], job, priority=priority)
        if spent is not None and "spent" in job.answer:
            spent.first_byte, spent.checksum_s, spent.write_s = job.answer["spent"]
        return version

    async def fetch_from_peer(
        self, request: PeerRequest, extent: Extent, landed: Landed, *, priority: Priority | None = None
    ) -> PeerAnswer:
        message = {"do": "peer", "request": asdict(request), **_place(extent)}
        return PeerAnswer(**await self._give(message, [extent.descriptor], _Job(landed), priority=priority))

    async def ask_peer(self, request: PeerRequest) -> PeerAnswer:
        return PeerAnswer(**await self._give({"do": "ask", "request": asdict(request)}, [], _Job()))

    async def copy(self, source: LocalBytes, extent: Extent) -> bool:
        message = {
            "do": "copy",
            **_place(extent),
            "from": source.position,
            "crc": source.crc,
            "sha256": source.sha256.hex(),
        }
        copied: bool = await self._give(message, [extent.descriptor, source.descriptor], _Job())
        return copied

    async def checksum(self, descriptor: int, start: int, stop: int) -> int | None:
        crc: int | None = await self._give({"do": "checksum", "start": start, "stop": stop}, [descriptor], _Job())
        return crc

    async def digest(
        self, descriptor: int, size: int, algorithm: Algorithm, part_size: int, *, idle: bool = False
    ) -> bytes | None:
        message = {"do": "digest", "start": 0, "stop": size, "algorithm": algorithm, "part_size": part_size}
        digest: str | None = await self._give(message, [descriptor], _Job(), "digest" if idle else "fetch")
        return None if digest is None else bytes.fromhex(digest)

    async def populate(self, descriptor: int, start: int, stop: int) -> None:
        await self._give({"do": "populate", "start": start, "stop": stop}, [descriptor], _Job())

    def _worker(self, role: Role) -> _Worker:
        """The process with the fewest jobs of those that answer, a new one rather than one that is busy.

        Raises StoreError.
        """
        workers = self._workers[role]
        least = min(workers, key=lambda worker: (worker.asked_s, len(worker.jobs)), default=None)
        if self._nursery is not None and (least is None or (least.jobs and len(workers) < self._most[role])):
            try:
                least = _Worker(self._spawner.spawn(role))
            except OSError as error:
                log.error("fetch process not started: %s", error)
            else:
                workers.append(least)
                self._nursery.start_soon(self._attend, least, role)
        if self._nursery is None or least is None:
            raise WorkerLostError("the fetch process died")
        return least

    async def _give(
        self,
        message: Message,
        descriptors: Sequence[int],
        job: _Job,
        role: Role = "fetch",
        *,
        priority: Priority | None = None,
    ) -> Any:
        """Have a process of this role, or of this priority, do a job; its result. Raises OSError and StoreError."""
        number = next(self._numbers)
        if priority is not None and priority.background:
            worker = self._worker("background")
            priority.on_lift(partial(self._lift, worker, number))
        else:
            worker = self._worker(role)
        worker.jobs[number] = job
        sent, writes = False, job.landed is not None or message["do"] == "copy"
        try:
            async with worker.sending:
                await worker.channel.send({"id": number, **message}, descriptors)
                sent = True
            await job.done.wait()
        except ChannelClosedError:
            raise WorkerLostError(worker.lost) from None
        except trio.Cancelled:
            if sent and writes and not job.done.is_set():
                worker.cancelled.add(number)
            if job.landed is not None:  # a fetch: the store need not send the rest
                worker.channel.try_post({"do": "cancel", "id": number})
            raise
        finally:
            worker.jobs.pop(number, None)
            worker.idle_since = trio.current_time()
            self._lower(worker, number)
        if "errno" in job.answer:
            raise OSError(job.answer["errno"], job.answer["text"])
        if "error" in job.answer:
            raise getattr(errors, job.answer["error"])(job.answer["text"])
        return job.answer["result"]

    def _lift(self, worker: _Worker, number: int) -> None:
        """A program waits for a job in the background: its process gets the priority of programs until it is done."""
        if number in worker.jobs and self._nursery is not None:
            worker.lifted.add(number)
            if len(worker.lifted) == 1:
                self._nursery.start_soon(self._set_priority, worker)

    def _lower(self, worker: _Worker, number: int) -> None:
        """Undo `_lift` when the job is done."""
        if number in worker.lifted:
            worker.lifted.remove(number)
            if not worker.lifted and self._nursery is not None:
                self._nursery.start_soon(self._set_priority, worker)

    async def _set_priority(self, worker: _Worker) -> None:
        """Give a background process the priority that its jobs have by now."""
        for _ in range(MOST_TRIES):
            if worker not in self._workers["background"] or not worker.ready or worker.pid is None:
                return  # it has ended, or tells soon that it is ready
            try:
                give_priority(worker.pid, "fetch" if worker.lifted else "background")
                return
            except BlockingIOError:
                await trio.sleep(TRY_AGAIN_S)
            except OSError as error:
                log.info("fetch process %d keeps its priority: %s", worker.pid, error)
                return

    async def _attend(self, worker: _Worker, role: Role) -> None:
        """Receive the answers of a process, and end it once there has been no job for it for a while.

        Raises StoreUnavailableError if the spawner has not started it, nor MOST_NOT_STARTED - 1 before it.
        """
        try:
            while await self._hear(worker, role):
                pass
        except ChannelClosedError:
            log.error("fetch process died: the next job starts another")
            self.died += 1
        except _SilentError as why:
            self.died += 1
            worker.lost = "the fetch process did not answer"
            if worker.pid is None:
                if worker.ordered_at >= self._missed_at:  # not one that was ordered with the last
                    self._not_started += 1
                    self._missed_at = trio.current_time()
                log.error("a fetch process was not started in %d s: the next job starts another", SILENT_S[role])
                if self._not_started >= MOST_NOT_STARTED:
                    raise StoreUnavailableError("the spawner does not answer: starting another server") from None
            else:
                log.error("fetch process %d %s: killing it, the next job starts another", worker.pid, why)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)  # or it writes on, once it wakes up, while its jobs begin anew
        finally:
            self._workers[role].remove(worker)
            worker.close()

    async def _hear(self, worker: _Worker, role: Role) -> bool:
        """Take the next message of a process; False once there has been no job for it for a while.

        Raises ChannelClosedError if it has ended, _SilentError if it is stopped, or has jobs and does not answer.
        """
        worker.asked_s = 0.0
        while True:
            # In short waits: while this process was stopped as well, e.g. with its container, just one of them passes.
            with trio.move_on_after(LOOK_INTERVAL_S):
                message = (await worker.channel.receive())[0]
                if "pid" in message:
                    worker.pid, self._not_started = message["pid"], 0
                elif "ready" in message:
                    worker.ready = True
                else:
                    _take(worker, message)
                    return True
                if worker.lifted and self._nursery is not None:
                    self._nursery.start_soon(self._set_priority, worker)
                return True
            if worker.pid is not None and worker.stop_watch.stays_stopped(worker.pid):
                raise _SilentError("is stopped")
            if worker.jobs or worker.cancelled:
                if worker.asked_s >= SILENT_S[role]:
                    raise _SilentError("does not answer")
                worker.channel.try_post({"do": "answer"})
                worker.asked_s += LOOK_INTERVAL_S
            elif trio.current_time() - worker.idle_since >= LINGER_S[role]:
                return False


def _place(extent: Extent) -> Message:
    """An extent as jobs tell it: its descriptor goes beside them."""
    return {"start": extent.start, "stop": extent.stop, "position": extent.position, "chunk_size": extent.chunk_size}


class _SilentError(Exception):
    """Why a fetch process is given up."""


def _take(worker: _Worker, answer: Message) -> None:
    """Tell the job of a worker what it has answered."""
    number = answer.get("id", -1)
    job = worker.jobs.get(number)
    if job is None:
        if answer.keys() & {"result", "errno", "error"}:
            worker.cancelled.discard(number)
        return
    if "landed" in answer:
        assert job.landed is not None
        job.landed(ChunkRecord(**answer.pop("landed")))
    if "arrived" in answer:
        assert job.arrived is not None
        job.arrived(answer["arrived"])
    elif len(answer) > 1:
        job.answer = answer
        job.done.set()
