"""The server's end of the channel to its keeper, who does what takes its privileges and keeps what outlives a server.

The keeper's end, with what each message may hold, is ``mountctl.keeper.protocol``.
"""

import errno
import json
import logging
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from trimsfs.concurrency.channel import Channel, ChannelClosedError, Message
from trimsfs.errors import FuseUnavailableError, MountpointError, TrimsError
from trimsfs.handover.ledger import VERSION

log = logging.getLogger(__name__)

ALIVE_INTERVAL_S = 2.0
_DESCRIPTORS = ("ledger", "lock", "fuse")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a server is given when its turn comes. Descriptors are None for the first one of a mount, which mounts.

    ``unclaimed`` is a backing id that the server before may not have heard of.
    """

    ledger: int
    lock: int | None
    fuse: int | None
    unclaimed: int | None
    restarts: int


def stand_by(end: socket.socket) -> Turn | None:
    """Tell the keeper that this process could serve, and wait for its turn; None when it is not needed any more."""
    end.send(json.dumps({"type": "standing-by", "ledger": VERSION}).encode())
    data, descriptors, _, _ = socket.recv_fds(end, 4096, len(_DESCRIPTORS))
    if not data:
        return None
    turn = json.loads(data)
    given: dict[str, int | None] = dict.fromkeys(_DESCRIPTORS)
    given.update(zip(turn["descriptors"], descriptors, strict=True))
    assert given["ledger"] is not None
    return Turn(
        ledger=given["ledger"],
        lock=given["lock"],
        fuse=given["fuse"],
        unclaimed=turn["unclaimed"],
        restarts=turn["restarts"],
    )


class Keeper:
    """The keeper, to be asked for what it alone may do."""

    def __init__(self, end: socket.socket) -> None:
        self._channel = Channel(end)
        self._asking = trio.Lock()
        self._later, self._to_tell = trio.open_memory_channel[tuple[Message, Callable[[], None]]](math.inf)
        self.pid = os.getppid()

    async def mount(self, lock: int) -> int:
        """Have the file system mounted and the lock of the cache directory kept; the /dev/fuse descriptor.

        Raises FuseUnavailableError, MountpointError.
        """
        answer, descriptors = await self._ask({"type": "mount"}, [lock])
        if descriptors:
            return descriptors[0]
        kind = MountpointError if answer.get("kind") == "MountpointError" else FuseUnavailableError
        raise kind(answer["error"])

    async def open(self, descriptor: int) -> int:
        """Register a file as a backing file of the mount; its id. Raises FuseUnavailableError."""
        answer, _ = await self._ask({"type": "backing-open"}, [descriptor])
        if "error" in answer:
            raise FuseUnavailableError(_why_no_backing(answer["errno"], answer["error"]))
        number: int = answer["id"]
        return number

    def close(self, backing_id: int, done: Callable[[], None] = lambda: None) -> None:
        """Give a backing id up, soon, and call *done* then."""
        self._later.send_nowait(({"type": "backing-close", "id": backing_id}, done))

    async def hold(self, number: int, descriptor: int) -> bool:
        """Have a descriptor of a GPU copy kept for later servers; False if it is not.

        What is kept and nobody knows of stays until the mount ends: a number is to be in the ledger before it is held,
        until it has been let go, and is not to be used again.
        """
        answer, _ = await self._ask_if_there({"type": "hold", "number": number}, [descriptor])
        if "error" in answer:
            log.warning("another server will not have GPU copy %d: %s", number, answer["error"])
        return "error" not in answer

    def let_go(self, number: int, done: Callable[[], None] = lambda: None) -> None:
        """Have what is held under a number let go, soon, and call *done* then; nothing may be."""
        self._later.send_nowait(({"type": "let-go", "number": number}, done))

    async def recall(self, number: int) -> int | None:
        """A descriptor of what is held under a number, and still is; None if nothing is."""
        _, descriptors = await self._ask_if_there({"type": "recall", "number": number})
        return descriptors[0] if descriptors else None

    async def listen(self) -> tuple[Path, int] | None:
        """The socket to which clients of GPU copies connect, the same one for each server of a mount, and its path.

        It does not block. None if there can be none.
        """
        answer, descriptors = await self._ask_if_there({"type": "listen"})
        if not descriptors:
            log.warning("no client can ask for GPU copies: %s", answer.get("error", os.strerror(errno.EMFILE)))
            return None
        return Path(answer["path"]), descriptors[0]

    async def run(self) -> None:
        """Pass on what `close` and `let_go` were told, and that the server is alive, for as long as it runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on)
            while True:
                await trio.sleep(ALIVE_INTERVAL_S)
                if not await self._tell({"type": "alive"}):
                    nursery.cancel_scope.cancel()

    async def _pass_on(self) -> None:
        async for message, done in self._to_tell:
            if await self._tell(message):
                done()

    async def ready(self, *, resends: bool) -> None:
        """Tell that the mount answers, and whether another server could go on with it."""
        await self._tell({"type": "ready", "resends": resends})

    async def _tell(self, message: Message) -> bool:
        """Whether the keeper could be told. Without it, what is evicted keeps its space until the next mount."""
        try:
            async with self._asking:
                await self._channel.send(message)
        except ChannelClosedError:
            return False
        return True

    async def _ask(self, message: Message, descriptors: Sequence[int] = ()) -> tuple[Message, list[int]]:
        try:
            async with self._asking:
                with trio.CancelScope(shield=True):  # the next answer would else be taken for that of the next question
                    await self._channel.send(message, descriptors)
                    answer = await self._channel.receive()
        except ChannelClosedError as error:
            raise FuseUnavailableError(f"the keeper is gone: {error}") from error
        return answer

    async def _ask_if_there(self, message: Message, descriptors: Sequence[int] = ()) -> tuple[Message, list[int]]:
        try:
            return await self._ask(message, descriptors)
        except FuseUnavailableError as error:
            return {"error": str(error)}, []


def tell_failure(end: socket.socket, error: TrimsError) -> None:
    """Tell the keeper, when all else has ended, why there is no mount, or no longer."""
    end.setblocking(True)
    message = {"type": "failed", "kind": type(error).__name__, "error": str(error)[:4096]}
    try:
        end.send(json.dumps(message).encode())
    except OSError:
        return  # it is gone, or has stopped listening


def _why_no_backing(number: int, text: str) -> str:
    """Why the kernel refuses a backing file, and what to do."""
    return {
        errno.EPERM: "passthrough takes CAP_SYS_ADMIN: mount as root",
        errno.ENOTTY: "this kernel has no FUSE passthrough: Linux 6.9 or newer has",
        errno.EOPNOTSUPP: "this kernel has no FUSE passthrough: Linux 6.9 or newer has",
        errno.ELOOP: "the cache directory lies on a stacked file system: choose a --cache-dir on ext4, xfs or tmpfs",
    }.get(number, f"the kernel refuses a backing file: {text}")
