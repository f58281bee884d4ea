"""The server's end of the channel to its keeper, which has the privileges and holds what outlives a server.

The keeper's end, and what each message may contain, is in ``mountctl.keeper.servers.server_messages``.
"""

import errno
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from trimsfs.concurrency.channel import Channel, ChannelClosedError, Message
from trimsfs.errors import FuseUnavailableError, MountpointError, TrimsError
from trimsfs.handover.ledger import VERSION
from trimsfs.processes import LOOK_INTERVAL_S, StopWatch, stopped

log = logging.getLogger(__name__)

ALIVE_INTERVAL_S = 2.0
ANSWER_LOOKS, MOUNT_LOOKS = 3, 30
"""How often, for LOOK_INTERVAL_S each, this process waits for an answer, and for that to a mount. While all processes
were stopped, just one of them passes."""
_DESCRIPTORS = ("ledger", "lock", "fuse", "standby")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What the keeper sends to a standby that it promotes. The first server of a mount gets no ``lock`` and ``fuse``.

    ``unclaimed`` are backing ids that the previous server may have died before receiving, ``restarts`` counts servers
    that another has replaced. ``backing_limit`` is how many files one message may register. ``standby`` is an end of a
    channel, for the standby that this server forks. ``vacant_since`` is when the previous server ended, by
    `time.monotonic`. ``keeper_pid`` and ``server_pid`` are as the keeper sees them, perhaps from another PID namespace.
    """

    ledger: int
    lock: int | None
    fuse: int | None
    standby: int | None
    unclaimed: tuple[int, ...]
    restarts: int
    backing_limit: int
    vacant_since: float
    keeper_pid: int
    server_pid: int


def stand_by(end: socket.socket, *, forks: bool = False) -> Promotion | None:
    """Tell the keeper that this process stands by, and wait to be promoted; None if the keeper dismisses it or ends.

    *forks*: this process can fork the next standby.
    """
    data, descriptors = b"", list[int]()
    message = {"type": "standing-by", "ledger": VERSION} | ({"forks": True} if forks else {})
    with suppress(ConnectionError):
        end.send(json.dumps(message).encode())
        data, descriptors, _, _ = socket.recv_fds(end, 4096, len(_DESCRIPTORS))
    if not data:
        return None
    promotion = json.loads(data)
    given: dict[str, int | None] = dict.fromkeys(_DESCRIPTORS)
    given.update(zip(promotion["descriptors"], descriptors, strict=True))
    assert given["ledger"] is not None
    return Promotion(
        ledger=given["ledger"],
        lock=given["lock"],
        fuse=given["fuse"],
        standby=given["standby"],
        unclaimed=tuple(promotion["all_unclaimed"]),
        restarts=promotion["restarts"],
        backing_limit=promotion["backing_limit"],
        vacant_since=promotion["vacant_since"] or time.monotonic(),
        keeper_pid=promotion["keeper_pid"],
        server_pid=promotion["server_pid"],
    )


@dataclass(slots=True, eq=False)
class _Registration:
    """A file to register as a backing file; ``result`` is its id or the error, once known."""

    descriptor: int
    result: int | FuseUnavailableError | None = None


class KeeperClient:
    """Asks the keeper for privileged operations; *pid* and *backing_limit* are those of the promotion.

    *recovery* is the command that starts another keeper. One that does not answer is asked nothing more until it does.
    """

    def __init__(
        self,
        end: socket.socket,
        *,
        recovery: str = "mountctl recover",
        pid: int | None = None,
        backing_limit: int = 1,
    ) -> None:
        self._channel = Channel(end)
        self._recovery = recovery
        self._asking = trio.Lock()
        self._backing_limit = backing_limit
        self._registrations: list[_Registration] = []
        self._queue, self._queued = trio.open_memory_channel[tuple[Message, Callable[[], None]]](math.inf)
        self._gone = self._silent = False
        self._owed = False
        """Whether the answer that nobody waits for any more is still to come."""
        self._stop_watch = StopWatch()
        self._seen, _ = self._channel.peer()
        self.in_sight = self._seen != 0
        """Whether the keeper is in a PID namespace that this process sees."""
        self.pid = pid or self._seen

    def connected(self) -> bool:
        """Whether the last message reached the keeper; `run` sends one every ALIVE_INTERVAL_S."""
        return not self._gone

    def problem(self) -> str | None:
        """Why the keeper does nothing for this server, with the remedy; None if it does."""
        none = "no server takes over if this one ends"
        if self._gone:
            return f"pid {self.pid} has ended: {none}: run `{self._recovery}`"
        is_stopped = stopped(self._seen)
        if is_stopped or self._silent:
            state = "is stopped" if is_stopped else "does not answer"
            return f"pid {self.pid} {state}: {none}: run `kill -CONT {self.pid}`, or `{self._recovery}`"
        return None

    async def mount(self, lock: int) -> int:
        """Ask the keeper to mount, and to keep the lock of the cache directory; the /dev/fuse descriptor.

        Raises FuseUnavailableError, MountpointError.
        """
        answer, descriptors = await self._ask({"type": "mount"}, [lock], looks=MOUNT_LOOKS)
        if descriptors:
            return descriptors[0]
        kind = MountpointError if answer.get("kind") == "MountpointError" else FuseUnavailableError
        raise kind(answer["error"])

    async def open(self, descriptor: int) -> int:
        """Register a file as a backing file of the mount; its id. Raises FuseUnavailableError.

        Callers that wait at the same time share a message, as each message costs two context switches. A cancelled
        caller still waits for its id, which would leak otherwise.
        """
        self._check_answers()
        registration = _Registration(descriptor)
        self._registrations.append(registration)
        with trio.CancelScope(shield=True):
            async with self._asking:
                while registration.result is None:
                    await self._register_some()
        result = registration.result
        assert result is not None
        if isinstance(result, FuseUnavailableError):
            raise result.with_traceback(None)
        return result

    async def _register_some(self) -> None:
        """Register the files whose callers have waited for longest."""
        count = min(len(self._registrations), self._backing_limit)
        some, self._registrations = self._registrations[:count], self._registrations[count:]
        message: Message = {"type": "backing-open", "count": count}
        results: list[int | FuseUnavailableError]
        try:
            answer, _ = await self._exchange(message, [registration.descriptor for registration in some])
            results = [_backing_id(each) for each in answer["answers"]]
        except FuseUnavailableError as error:
            results = [error] * count
        for registration, result in zip(some, results, strict=True):
            registration.result = result

    def close(self, backing_id: int, done: Callable[[], None] = lambda: None) -> None:
        """Queue the release of a backing id; call *done* once the message is sent."""
        self._queue.send_nowait(({"type": "backing-close", "id": backing_id}, done))

    async def hold(self, number: int, descriptor: int) -> bool:
        """Store a descriptor of a GPU copy with the keeper, for later servers; False if the keeper refuses.

        A descriptor whose number is lost leaks until the unmount. So keep the number in the ledger from before this
        call until after `let_go`, and never reuse it.
        """
        answer, _ = await self._ask_if_there({"type": "hold", "number": number}, [descriptor])
        if "error" in answer:
            log.warning("GPU copy %d will be lost when this server ends: %s", number, answer["error"])
        return "error" not in answer

    def let_go(self, number: int, done: Callable[[], None] = lambda: None) -> None:
        """Queue the release of a stored descriptor, if there is one; call *done* once the message is sent."""
        self._queue.send_nowait(({"type": "let-go", "number": number}, done))

    async def recall(self, number: int) -> int | None:
        """A duplicate of the descriptor stored under a number; None if there is none."""
        _, descriptors = await self._ask_if_there({"type": "recall", "number": number})
        return descriptors[0] if descriptors else None

    async def listen(self) -> tuple[Path, int] | None:
        """The path and the descriptor of the non-blocking socket of GPU clients, the same for each server of a mount.

        None if the keeper cannot create it.
        """
        answer, descriptors = await self._ask_if_there({"type": "listen"})
        if not descriptors:
            log.warning("GPU clients cannot connect: %s", answer.get("error", os.strerror(errno.EMFILE)))
            return None
        return Path(answer["path"]), descriptors[0]

    async def run(self) -> None:
        """Send queued releases, and a sign of life every ALIVE_INTERVAL_S, until the keeper is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_queued)
            while True:
                await trio.sleep(ALIVE_INTERVAL_S)
                if self._stop_watch.stays_stopped(self._seen):
                    self._fell_silent()
                elif not await self._tell({"type": "alive"}) and self._gone:
                    nursery.cancel_scope.cancel()

    async def _send_queued(self) -> None:
        async for message, done in self._queued:
            if await self._tell_at_last(message):
                done()

    async def ready(self, *, resends: bool) -> None:
        """Tell the keeper that the mount answers, and whether another server could take it over."""
        await self._tell_at_last({"type": "ready", "resends": resends})

    async def _tell_at_last(self, message: Message) -> bool:
        """Send a message, however long the keeper takes none; False if it is gone."""
        while not (sent := await self._tell(message)) and not self._gone:
            pass  # it has waited meanwhile
        return sent

    async def _tell(self, message: Message) -> bool:
        """Send a message; False if the keeper does not take it within LOOK_INTERVAL_S, or is gone.

        If it is gone, evicted files keep their space until the next mount.
        """
        try:
            async with self._asking:
                with trio.move_on_after(LOOK_INTERVAL_S):
                    if self._owed:
                        self._give_back(*await self._channel.receive())
                    await self._channel.send(message)
                    if self._silent and not stopped(self._seen):
                        self._silent = False
                        log.info("the keeper, pid %d, answers again", self.pid)
                    return True
        except ChannelClosedError:
            self._lost()
        return False

    def _give_back(self, answer: Message, descriptors: list[int]) -> None:
        """Give back what has come too late."""
        self._owed = False
        for each in answer.get("answers", [answer]):
            if "id" in each:
                self.close(each["id"])
        for descriptor in descriptors:
            os.close(descriptor)

    def _fell_silent(self) -> None:
        if not self._silent:
            self._silent = True
            log.error(
                "the keeper, pid %d, %s: new files are read through the server, and no server takes over if this one "
                "ends: run `kill -CONT %d`, or `%s`",
                self.pid,
                "is stopped" if stopped(self._seen) else "does not answer",
                self.pid,
                self._recovery,
            )

    def _check_answers(self) -> None:
        """Raises FuseUnavailableError while the keeper does not answer."""
        if self._silent:
            raise self._no_answer()

    def _no_answer(self) -> FuseUnavailableError:
        return FuseUnavailableError(f"the keeper does not answer: run `kill -CONT {self.pid}`, or `{self._recovery}`")

    def _lost(self) -> None:
        if not self._gone:
            self._gone = True
            log.error(
                "the keeper, pid %d, has ended: no server takes over if this one ends: run `%s`",
                self.pid,
                self._recovery,
            )

    async def _ask(
        self, message: Message, descriptors: Sequence[int] = (), *, looks: int = ANSWER_LOOKS
    ) -> tuple[Message, list[int]]:
        self._check_answers()
        async with self._asking:
            with trio.CancelScope(shield=True):  # else a later request would get the answer to this one
                return await self._exchange(message, descriptors, looks=looks)
        raise AssertionError("unreachable: a shield swallows nothing")

    async def _exchange(
        self, message: Message, descriptors: Sequence[int], *, looks: int = ANSWER_LOOKS
    ) -> tuple[Message, list[int]]:
        self._check_answers()
        sent = False
        try:
            for _ in range(looks):
                with trio.move_on_after(LOOK_INTERVAL_S):
                    if not sent:
                        await self._channel.send(message, descriptors)
                        sent = True
                    return await self._channel.receive()
        except ChannelClosedError as error:
            self._lost()
            raise FuseUnavailableError(f"the keeper has ended: run `{self._recovery}`") from error
        self._owed = sent
        self._fell_silent()
        raise self._no_answer()

    async def _ask_if_there(self, message: Message, descriptors: Sequence[int] = ()) -> tuple[Message, list[int]]:
        try:
            return await self._ask(message, descriptors)
        except FuseUnavailableError as error:
            return {"error": str(error)}, []


def tell_failure(end: socket.socket, error: TrimsError) -> None:
    """Tell the keeper why this server ends."""
    end.setblocking(True)
    message = {"type": "failed", "kind": type(error).__name__, "error": str(error)[:4096]}
    try:
        end.send(json.dumps(message).encode())
    except OSError:
        return  # the keeper is gone, or receives no more


def _backing_id(answer: Message) -> int | FuseUnavailableError:
    """The id of a backing file, or the error."""
    if "error" in answer:
        return FuseUnavailableError(_why_no_backing(answer["errno"], answer["error"]))
    number: int = answer["id"]
    return number


def _why_no_backing(number: int, text: str) -> str:
    """Why the kernel refuses a backing file, with the remedy if there is one."""
    return {
        errno.EPERM: "passthrough needs CAP_SYS_ADMIN: mount as root",
        errno.ENOTTY: "this kernel has no FUSE passthrough: use Linux 6.9 or newer",
        errno.EOPNOTSUPP: "this kernel has no FUSE passthrough: use Linux 6.9 or newer",
        errno.ELOOP: "the cache directory is on a stacked file system: set --cache-dir to one on ext4, xfs or tmpfs",
    }.get(number, f"the kernel refuses a backing file: {text}")
