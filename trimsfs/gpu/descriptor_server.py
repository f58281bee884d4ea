"""Descriptors of copies for those who have a lease: over a Unix socket, whose listening end the keeper holds.

A client sends ``{"token": ...}``, which it has from its control file, and gets ``{"size": ...}`` with a descriptor of
the memory, or ``{"error": ..., "kind": ...}``. The connection is a lease of its own until it is closed.
"""

import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from trimsfs.concurrency.channel import Channel, ChannelClosedError, Message
from trimsfs.gpu.holders import holder_of
from trimsfs.tiers.gpu.pool import Holder, Lease

log = logging.getLogger(__name__)

MOST_CONNECTIONS, MOST_OF_USER = 1024, 256
PATIENCE_S = 10.0
"""How long a client may take to say what it wants."""

Lend = Callable[[Lease, Holder], Lease]


class DescriptorServer:
    """Tokens of leases, and the socket where they are worth a descriptor.

    *lend* makes another lease of the same copy, *release* ends it. ``path`` is None where clients cannot connect.
    """

    def __init__(self, lend: Lend, release: Callable[[Lease], None], *, may_share: Callable[[int, int], bool]) -> None:
        self._lend = lend
        self._release = release
        self._may_share = may_share
        self._leases: dict[str, Lease] = {}
        self._known: dict[Lease, str] = {}
        self._connections: Counter[int] = Counter()
        self.path: Path | None = None

    def token(self, lease: Lease) -> str:
        """The token of a lease; nobody can guess it."""
        token = self._known.get(lease)
        if token is None:
            token = self._known[lease] = secrets.token_hex(16)
            self._leases[token] = lease
        return token

    def ended(self, lease: Lease) -> None:
        """The token of a lease is worth nothing any more."""
        token = self._known.pop(lease, None)
        if token is not None:
            del self._leases[token]

    async def run(
        self, path: Path, listener: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer whoever connects, for as long as the server runs."""
        self.path = path
        task_status.started()
        places = trio.Semaphore(MOST_CONNECTIONS)
        listening = trio.socket.from_stdlib_socket(socket.socket(fileno=listener))
        async with trio.open_nursery() as nursery:
            while True:
                await places.acquire()
                try:
                    end, _ = await listening.accept()
                except OSError as error:
                    places.release()
                    log.error("no client of GPU copies can connect: %s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(self._serve, end, places)

    async def _serve(self, end: trio.socket.SocketType, places: trio.Semaphore) -> None:
        channel = Channel(socket.socket(fileno=end.detach()))
        try:
            pid, uid = channel.peer()
            with self._place_of(uid) as free:
                if free:
                    await self._answer(channel, holder_of(uid, pid))
                else:
                    await channel.refuse({"error": "too many connections of this user", "kind": "InUseError"})
        except (ChannelClosedError, OSError):
            pass  # it has gone
        except Exception:  # a defect: it ends this connection, not the server
            log.exception("a connection failed")
        finally:
            channel.close()
            places.release()

    @contextmanager
    def _place_of(self, uid: int) -> Iterator[bool]:
        """Whether a user may have another connection, for the length of the block."""
        if self._connections[uid] >= MOST_OF_USER:
            yield False
            return
        self._connections[uid] += 1
        try:
            yield True
        finally:
            self._connections[uid] -= 1

    async def _answer(self, channel: Channel, holder: Holder) -> None:
        message: Message = {}
        with trio.move_on_after(PATIENCE_S):
            message = await _receive(channel)
        token = message.get("token") if isinstance(message, dict) else None
        given = self._leases.get(token) if isinstance(token, str) else None
        if given is not None:
            with trio.move_on_after(PATIENCE_S):  # it may be on its way from an earlier server
                await given.copy.done.wait()
        if given is None or not given.copy.ready or given.copy.descriptor is None:
            await channel.send({"error": "no lease has this token, or not any more", "kind": "NoSuchEntryError"})
        elif not self._may_share(given.holder.uid, holder.uid):
            log.warning("uid %d has a token of uid %d", holder.uid, given.holder.uid)
            await channel.send({"error": "the token is another user's", "kind": "NotPermittedError"})
        else:
            lease = self._lend(given, holder)
            try:
                await channel.send({"size": given.copy.size}, [given.copy.descriptor])
                while True:
                    await _receive(channel)
            finally:
                self._release(lease)


async def _receive(channel: Channel) -> Message:
    """The next message; descriptors that nobody has asked for are closed."""
    message, descriptors = await channel.receive()
    for descriptor in descriptors:
        os.close(descriptor)
    return message
