"""Fetch processes move bytes for the server, so that its event loop has a core and the GIL to itself.

Each runs a ``ThreadCopier`` at a low priority and writes what it fetches straight into the blob, whose descriptor comes
with the job. When one dies, its jobs fail and are retried in the others. They end once there is nothing to do.
"""

import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import trio

from trimsfs import errors
from trimsfs.concurrency.channel import Channel, ChannelClosedError, Message, pair
from trimsfs.errors import StoreError, StoreUnavailableError, TransientStoreError
from trimsfs.fetch.copier import Arrived, Extent, Landed, LocalBytes, ThreadCopier
from trimsfs.fetch.peers import PeerAnswer, PeerRequest
from trimsfs.stores.digests import Algorithm
from trimsfs.telemetry.trace import Spent
from trimsfs.text import set_process_title
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

Role = Literal["fetch", "digest"]
"""What a process is for: all jobs, or those that only idle time is spent on."""

NICENESS = 10
"""Below the server and the programs that use models."""
LOWEST_NICENESS = 19
LINGER_S: dict[Role, float] = {"fetch": 30.0, "digest": 5.0}
"""How long a process waits for its next job before it ends."""
_GENERATION = tuple(each.name for each in fields(Generation))
TEXT_LIMIT = 4096
"""Characters of an error that are passed on: a message has to hold them."""


class Spawner:
    """A process forked while the server has neither threads nor descriptors to leak, but for those that are
    *not_for_it*, which forks the workers.

    It ends with the server, and so do they: each reads from a socket whose other end only the server holds.
    *mountpoint* is what ``ps`` shows that they work for.
    """

    def __init__(
        self, make_copier: Callable[[], ThreadCopier], *, mountpoint: Path, not_for_it: Iterable[int] = ()
    ) -> None:
        ours, theirs = pair()
        if os.fork() == 0:
            ours.close()
            for descriptor in not_for_it:
                os.close(descriptor)
            set_process_title("spawner", mountpoint)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the server, which ends the spawner
            try:
                _spawn(theirs, make_copier, mountpoint)
            except BaseException:
                log.exception("the spawner ends")
            finally:
                os._exit(0)
        theirs.close()
        self._socket = ours

    async def watch(self) -> NoReturn:
        """Raises StoreUnavailableError once the spawner has ended: the next server forks another one."""
        await trio.lowlevel.wait_readable(self._socket)
        raise StoreUnavailableError("the spawner has ended: starting another server")

    def spawn(self, role: Role = "fetch") -> socket.socket:
        """A socket to a new worker. Raises OSError when there is no spawner any more."""
        ours, theirs = pair()
        with theirs:
            try:
                socket.send_fds(self._socket, [role.encode()], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours


def _spawn(orders: socket.socket, make_copier: Callable[[], ThreadCopier], mountpoint: Path) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # they are not waited for
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, 16, 1)
        if not data:
            return
        if not descriptors:
            continue  # there were too many open: the server finds the socket closed
        with socket.socket(fileno=descriptors[0]) as end:
            try:
                child = os.fork()
            except OSError:
                continue  # the server finds the socket closed
            if child == 0:
                orders.close()
                status = 1
                try:
                    role = data.decode()
                    set_process_title(role, mountpoint)
                    _stand_back(idle=role == "digest")
                    trio.run(_work, end, make_copier)
                    status = 0
                finally:
                    os._exit(status)  # without waiting for threads that wait for a store


def _stand_back(*, idle: bool) -> None:
    """Give way to the server and to the programs that use models: with *idle*, to all that wants a core or the disk."""
    niceness = LOWEST_NICENESS if idle else NICENESS
    os.setsid()  # where the kernel shares cores by session, niceness counts within one only
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(niceness, before))  # who is below it may not rise
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))
    if idle:
        with contextlib.suppress(OSError):  # of the disk as well: the I/O priority follows
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


async def _work(end: socket.socket, make_copier: Callable[[], ThreadCopier]) -> None:
    """Do jobs until the server is gone, or needs this process no longer."""
    channel, copier = Channel(end), make_copier()
    scopes: dict[int, trio.CancelScope] = {}

    async def do(job: Message, descriptors: Sequence[int]) -> None:
        with scopes[job["id"]]:
            await _do(copier, job, descriptors, channel)
        del scopes[job["id"]]

    async with trio.open_nursery() as nursery:
        with contextlib.suppress(ChannelClosedError):
            while True:
                message, descriptors = await channel.receive()
                if message["do"] != "cancel":
                    scopes[message["id"]] = trio.CancelScope()
                    nursery.start_soon(do, message, descriptors)
                elif message["id"] in scopes:  # else it has ended
                    scopes[message["id"]].cancel()
        nursery.cancel_scope.cancel()


async def _do(copier: ThreadCopier, job: Message, descriptors: Sequence[int], channel: Channel) -> None:
    number = job["id"]
    alone: Message = {}

    def landed(record: ChunkRecord) -> None:
        told = {"landed": {"chunk": record.chunk, "length": record.length, "crc": record.crc}}
        if record.length == job["stop"] - job["start"]:
            alone.update(told)  # told with the end of the job: small files are many
        else:
            channel.post({"id": number, **told})

    def arrived(offset: int) -> None:
        channel.post({"id": number, "arrived": offset})

    answer: Message
    spent = Spent()
    try:
        answer = {"result": await _perform(copier, job, descriptors, landed, arrived, spent)}
        if spent.first_byte:
            answer["spent"] = [spent.first_byte, spent.checksum_s, spent.write_s]
    except OSError as error:
        answer = {"errno": error.errno, "text": error.strerror}
    except StoreError as error:
        answer = {"error": type(error).__name__, "text": str(error)[:TEXT_LIMIT]}
    except Exception as error:  # a defect: it ends this job, not the worker
        answer = {"error": "StoreUnavailableError", "text": f"internal error: {error!r}"[:TEXT_LIMIT]}
    finally:
        for descriptor in descriptors:
            os.close(descriptor)  # a copier that was cancelled uses it no more
    with contextlib.suppress(ChannelClosedError):  # the receiving task notices it as well
        channel.post({"id": number, **alone, **answer})


async def _perform(
    copier: ThreadCopier, job: Message, descriptors: Sequence[int], landed: Landed, arrived: Arrived, spent: Spent
) -> str | int | Message | None:
    if job["do"] == "ask":
        return asdict(await copier.ask_peer(PeerRequest(**job["request"])))
    start, stop, descriptor = job["start"], job["stop"], descriptors[0]
    if job["do"] == "fetch":
        generation = Generation(**job["generation"])
        wanted = arrived if job["progress"] else None
        extent = Extent(start, stop, descriptor, job["position"], job["chunk_size"])
        return await copier.fetch(generation, extent, landed, wanted, spent=spent)
    if job["do"] == "peer":
        extent = Extent(start, stop, descriptor, job["position"], job["chunk_size"])
        return asdict(await copier.fetch_from_peer(PeerRequest(**job["request"]), extent, landed))
    if job["do"] == "copy":
        source = LocalBytes(descriptors[1], job["from"], job["crc"], bytes.fromhex(job["sha256"]))
        return await copier.copy(source, Extent(start, stop, descriptor, job["position"], job["chunk_size"]))
    if job["do"] == "checksum":
        return await copier.checksum(descriptor, start, stop)
    if job["do"] == "digest":
        found = await copier.digest(descriptor, stop, job["algorithm"], job["part_size"])
        return None if found is None else found.hex()
    await copier.populate(descriptor, start, stop)
    return None


@dataclass(slots=True, eq=False)
class _Job:
    landed: Landed | None = None
    arrived: Arrived | None = None
    done: trio.Event = field(default_factory=trio.Event)
    answer: Message = field(default_factory=dict)


class _Worker:
    def __init__(self, end: socket.socket) -> None:
        self.channel = Channel(end)
        self.jobs: dict[int, _Job] = {}
        self.sending = trio.Lock()


class WorkerPool:
    """A `Copier` that has up to *count* fetch processes do the work; each starts when it is needed, and ends when it is
    not any more."""

    def __init__(self, spawner: Spawner, *, count: int) -> None:
        self._spawner = spawner
        self._most: dict[Role, int] = {"fetch": count, "digest": 1}
        self._workers: dict[Role, list[_Worker]] = {"fetch": [], "digest": []}
        self._numbers = itertools.count()
        self._nursery: trio.Nursery | None = None
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
        spent: Spent | None = None,
    ) -> str | None:
        message = {
            "do": "fetch",
            "generation": {name: getattr(generation, name) for name in _GENERATION},
            "start": extent.start,
            "stop": extent.stop,
            "position": extent.position,
            "chunk_size": extent.chunk_size,
            "progress": arrived is not None,
        }
        job = _Job(landed, arrived)
        version: str | None = await self._give(message, [extent.descriptor], job)
        if spent is not None and "spent" in job.answer:
            spent.first_byte, spent.checksum_s, spent.write_s = job.answer["spent"]
        return version

    async def fetch_from_peer(self, request: PeerRequest, extent: Extent, landed: Landed) -> PeerAnswer:
        message = {
            "do": "peer",
            "request": asdict(request),
            "start": extent.start,
            "stop": extent.stop,
            "position": extent.position,
            "chunk_size": extent.chunk_size,
        }
        return PeerAnswer(**await self._give(message, [extent.descriptor], _Job(landed)))

    async def ask_peer(self, request: PeerRequest) -> PeerAnswer:
        return PeerAnswer(**await self._give({"do": "ask", "request": asdict(request)}, [], _Job()))

    async def copy(self, source: LocalBytes, extent: Extent) -> bool:
        message = {
            "do": "copy",
            "start": extent.start,
            "stop": extent.stop,
            "position": extent.position,
            "chunk_size": extent.chunk_size,
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
        found: str | None = await self._give(message, [descriptor], _Job(), "digest" if idle else "fetch")
        return None if found is None else bytes.fromhex(found)

    async def populate(self, descriptor: int, start: int, stop: int) -> None:
        await self._give({"do": "populate", "start": start, "stop": stop}, [descriptor], _Job())

    def _worker(self, role: Role) -> _Worker:
        """The process with the fewest jobs, a new one rather than one that is busy. Raises StoreError."""
        workers = self._workers[role]
        least = min(workers, key=lambda worker: len(worker.jobs), default=None)
        if self._nursery is not None and (least is None or (least.jobs and len(workers) < self._most[role])):
            try:
                least = _Worker(self._spawner.spawn(role))
            except OSError as error:
                log.error("fetch process not started: %s", error)
            else:
                workers.append(least)
                self._nursery.start_soon(self._attend, least, role)
        if self._nursery is None or least is None:
            raise _lost()
        return least

    async def _give(self, message: Message, descriptors: Sequence[int], job: _Job, role: Role = "fetch") -> Any:
        """Have a process of this role do a job; its result. Raises OSError and StoreError."""
        worker = self._worker(role)
        number = next(self._numbers)
        worker.jobs[number] = job
        try:
            async with worker.sending:
                await worker.channel.send({"id": number, **message}, descriptors)
            await job.done.wait()
        except ChannelClosedError:
            raise _lost() from None
        except trio.Cancelled:
            if job.landed is not None:  # a fetch: the store need not send the rest
                worker.channel.try_post({"do": "cancel", "id": number})
            raise
        finally:
            worker.jobs.pop(number, None)
        if "errno" in job.answer:
            raise OSError(job.answer["errno"], job.answer["text"])
        if "error" in job.answer:
            raise getattr(errors, job.answer["error"])(job.answer["text"])
        return job.answer["result"]

    async def _attend(self, worker: _Worker, role: Role) -> None:
        """Receive the answers of a process, and end it once there has been no job for it for a while."""
        try:
            while True:
                with trio.move_on_after(LINGER_S[role]) as scope:
                    _take(worker, (await worker.channel.receive())[0])
                if scope.cancelled_caught and not worker.jobs:
                    break
        except ChannelClosedError:
            log.error("fetch process died: the next job starts another")
            self.died += 1
        finally:
            self._workers[role].remove(worker)
            worker.channel.close()
            _fail_all(worker)


def _take(worker: _Worker, answer: Message) -> None:
    """Tell the job of a worker what it has answered."""
    job = worker.jobs.get(answer["id"])
    if job is None:
        return  # its caller was cancelled
    if "landed" in answer:
        assert job.landed is not None
        job.landed(ChunkRecord(**answer.pop("landed")))
    if "arrived" in answer:
        assert job.arrived is not None
        job.arrived(answer["arrived"])
    elif len(answer) > 1:
        job.answer = answer
        job.done.set()


def _fail_all(worker: _Worker) -> None:
    """Fail the jobs of a process that will not answer."""
    for job in worker.jobs.values():
        job.answer = {"error": TransientStoreError.__name__, "text": str(_lost())}
        job.done.set()


def _lost() -> TransientStoreError:
    return TransientStoreError("the fetch process died")
