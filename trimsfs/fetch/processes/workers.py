"""Fetch processes move bytes for the server, so that its event loop has a core and the GIL to itself.

Each runs a ``ThreadCopier`` and writes what it fetches straight into the blob, whose descriptor comes with the job.
`trimsfs.fetch.processes.worker_pool.WorkerPool` is the server's side.
"""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import trio

from trimsfs.concurrency.channel import Channel, ChannelClosedError, Message, pair
from trimsfs.concurrency.helper_process import HelperProcess, fork_helper
from trimsfs.errors import StoreError, TransientStoreError
from trimsfs.fetch.copier import Arrived, Extent, Landed, LocalBytes
from trimsfs.fetch.peers import PeerRequest
from trimsfs.fetch.processes.thread_copier import ThreadCopier
from trimsfs.processes import may_rise, prioritise
from trimsfs.telemetry.open_trace import Spent
from trimsfs.text import set_process_title
from trimsfs.types import ChunkRecord, Generation

log = logging.getLogger(__name__)

Role = Literal["fetch", "background", "digest"]
"""What a process is for: jobs that programs wait for, those that none waits for, or those that only idle time is spent
on."""

NICENESS: dict[Role, int] = {"fetch": 0, "background": 10, "digest": 19}
"""Those that programs wait for are scheduled as programs are: a load must not starve beside others that compute."""
TRY_AGAIN_S, MOST_TRIES = 0.1, 10
"""The kernel changes the priority of a session for users other than root at most so often."""
TEXT_LIMIT = 4096
"""Characters of an error that are passed on: a message has to hold them."""


class Spawner(Protocol):
    """Starts workers, each with a socket that only the server holds: a worker ends once that is closed."""

    def spawn(self, role: Role) -> socket.socket:
        """A socket to a new worker, which tells its pid, and that it is ready. Raises OSError if there will be none."""

    async def watch(self) -> NoReturn:
        """Raises StoreUnavailableError once no worker can be started any more."""


class ForkedSpawner:
    """A `Spawner` that has a helper process fork the workers. The process ends with the server."""

    def __init__(self, process: HelperProcess) -> None:
        self._socket = process.socket
        self.watch = process.watch

    def spawn(self, role: Role) -> socket.socket:
        ours, theirs = pair()
        with theirs:
            try:
                socket.send_fds(self._socket, [role.encode()], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours


def fork_spawner(
    make_copier: Callable[[], ThreadCopier], *, mountpoint: Path, not_for_it: Iterable[int] = ()
) -> HelperProcess:
    """Fork the process of a `ForkedSpawner`, as by `fork_helper`."""

    def work(orders: socket.socket) -> None:
        try:
            _spawn(orders, make_copier, mountpoint)
        except BaseException:
            log.exception("the spawner ends")

    return fork_helper("spawner", work, mountpoint=mountpoint, not_for_it=not_for_it)


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
                    role: Role = data.decode()  # type: ignore[assignment]  # as `ForkedSpawner.spawn` has sent it
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else helpers for credentials never fail
                    set_process_title(role, mountpoint)
                    _take_priority(role)
                    trio.run(_work, end, make_copier)
                    status = 0
                finally:
                    os._exit(status)  # without waiting for threads that wait for a store
            with contextlib.suppress(OSError):  # the server needs it no more
                end.send(json.dumps({"pid": child}).encode())  # for the child, which may be stopped before it can


def give_priority(pid: int, role: Role) -> None:
    """Give a fetch process the priority of a role. Raises as `prioritise`.

    If a background process could not be lifted again, only its session is low: that may rise.
    """
    stuck = role == "background" and not may_rise()
    prioritise(pid, NICENESS["fetch" if stuck else role], session=NICENESS[role])


def _take_priority(role: Role) -> None:
    """Take the priority of a role."""
    os.setsid()  # where the kernel shares cores by session, niceness counts within one only
    with contextlib.suppress(OSError):  # it may not rise
        for _ in range(MOST_TRIES):
            try:
                give_priority(os.getpid(), role)
                break
            except BlockingIOError:
                time.sleep(TRY_AGAIN_S)
    if role == "digest":
        with contextlib.suppress(OSError):  # of the disk as well: the I/O priority follows
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


async def _work(end: socket.socket, make_copier: Callable[[], ThreadCopier]) -> None:
    """Do jobs until the server is gone, or needs this process no longer."""
    channel = Channel(end)
    with contextlib.suppress(ChannelClosedError):
        channel.post({"ready": True})  # its priority may be changed from now on
    copier = _copier(make_copier)
    scopes: dict[int, trio.CancelScope] = {}

    async def do(job: Message, descriptors: Sequence[int]) -> None:
        number = job["id"]
        with scopes[number] as scope:
            await _do(copier, job, descriptors, channel)
        del scopes[number]
        if scope.cancelled_caught:
            with contextlib.suppress(ChannelClosedError):
                channel.post({"id": number, "result": None})  # it writes no more
        if isinstance(copier, StoreError):
            nursery.cancel_scope.cancel()  # the next process tries again

    async with trio.open_nursery() as nursery:
        with contextlib.suppress(ChannelClosedError):
            while True:
                message, descriptors = await channel.receive()
                if _is_given_up(end):
                    break
                if message["do"] == "answer":
                    channel.post({})
                elif message["do"] != "cancel":
                    scopes[message["id"]] = trio.CancelScope()
                    nursery.start_soon(do, message, descriptors)
                elif message["id"] in scopes:  # else it has ended
                    scopes[message["id"]].cancel()
        nursery.cancel_scope.cancel()


def _is_given_up(end: socket.socket) -> bool:
    """Whether the server has closed its end: others do the jobs that are left in this one."""
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    return bool(poll.poll(0))


def _copier(make_copier: Callable[[], ThreadCopier]) -> ThreadCopier | StoreError:
    """A copier, or why there is none: not every store works after a fork, and one that is opened anew may be away."""
    try:
        return make_copier()
    except StoreError as error:
        return TransientStoreError(str(error))
    except Exception as error:
        log.exception("a fetch process cannot open the store")
        return TransientStoreError(f"cannot be opened: {error!r}")


async def _do(copier: ThreadCopier | StoreError, job: Message, descriptors: Sequence[int], channel: Channel) -> None:
    number = job["id"]
    alone: Message = {}

    def landed(record: ChunkRecord) -> None:
        news = {"landed": asdict(record)}
        if record.length == job["stop"] - job["start"]:
            alone.update(news)  # it goes with the end of the job: small files are many
        else:
            channel.post({"id": number, **news})

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
    except ChannelClosedError:
        return  # the server has ended: the receiving task notices it as well
    except Exception as error:  # a defect: it ends this job, not the worker
        log.exception("%s: internal error in a fetch process", job.get("generation", {}).get("key", job["do"]))
        answer = {"error": "StoreUnavailableError", "text": f"internal error: {error!r}"[:TEXT_LIMIT]}
    finally:
        for descriptor in descriptors:
            os.close(descriptor)  # a copier that was cancelled uses it no more
    with contextlib.suppress(ChannelClosedError):  # the receiving task notices it as well
        channel.post({"id": number, **alone, **answer})


async def _perform(
    copier: ThreadCopier | StoreError,
    job: Message,
    descriptors: Sequence[int],
    landed: Landed,
    arrived: Arrived,
    spent: Spent,
) -> str | int | Message | None:
    if isinstance(copier, StoreError):
        raise copier
    if job["do"] == "ask":
        return asdict(await copier.ask_peer(PeerRequest(**job["request"])))
    start, stop, descriptor = job["start"], job["stop"], descriptors[0]
    if job["do"] == "fetch":
        generation = Generation(**job["generation"])
        hears = arrived if job["arrived"] else None
        return await copier.fetch(generation, _extent(job, descriptor), landed, hears, eager=job["eager"], spent=spent)
    if job["do"] == "peer":
        asked = PeerRequest(**job["request"])
        return asdict(await copier.fetch_from_peer(asked, _extent(job, descriptor), landed))
    if job["do"] == "copy":
        source = LocalBytes(descriptors[1], job["from"], job["crc"], bytes.fromhex(job["sha256"]))
        return await copier.copy(source, _extent(job, descriptor))
    if job["do"] == "checksum":
        return await copier.checksum(descriptor, start, stop)
    if job["do"] == "digest":
        digest = await copier.digest(descriptor, stop, job["algorithm"], job["part_size"])
        return None if digest is None else digest.hex()
    await copier.populate(descriptor, start, stop)
    return None


def _extent(job: Message, descriptor: int) -> Extent:
    return Extent(job["start"], job["stop"], descriptor, job["position"], job["chunk_size"])
