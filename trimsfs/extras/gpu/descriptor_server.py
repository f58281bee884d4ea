"""Serves descriptors of copies to holders of leases, over a Unix socket whose listening end the keeper holds.

A client sends ``{"token": ...}``, which it reads from its control file. It receives ``{"size": ...}`` and a descriptor
of the memory, or ``{"error": ..., "kind": ...}``. The connection is another lease until either side closes it.
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
from trimsfs.extras.gpu.holder_identity import holder_of
from trimsfs.extras.gpu.tier.leased_copies import Holder, Lease

log = logging.getLogger(__name__)

MOST_CONNECTIONS, MOST_OF_USER = 1024, 256
PATIENCE_S = 10.0
"""How long a client may take to send its request."""

Share = Callable[[Lease, Holder], Lease]


class DescriptorServer:
    """Issues tokens for leases, and sends a descriptor to each client that presents one.

    *share* makes another lease of the same copy, *release* ends it. ``path`` is None if clients cannot connect.
    """

    def __init__(
        self, share: Share, release: Callable[[Lease], None], *, may_share: Callable[[int, int], bool]
    ) -> None:
        self._share = share
        self._release = release
        self._may_share = may_share
        self._leases: dict[str, Lease] = {}
        self._known: dict[Lease, str] = {}
        self._connections: Counter[int] = Counter()
        self.path: Path | None = None

    def token(self, lease: Lease) -> str:
        """The token of a lease, which nobody can guess."""
        token = self._known.get(lease)
        if token is None:
            token = self._known[lease] = secrets.token_hex(16)
            self._leases[token] = lease
        return token

    def ended(self, lease: Lease) -> None:
        """Revoke the token of an ended lease."""
        token = self._known.pop(lease, None)
        if token is not None:
            del self._leases[token]

    async def run(
        self, path: Path, listener: int, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer clients until the server ends."""
        self.path = path
        task_status.started()
        connections = trio.Semaphore(MOST_CONNECTIONS)
        listening = trio.socket.from_stdlib_socket(socket.socket(fileno=listener))
        async with trio.open_nursery() as nursery:
            while True:
                await connections.acquire()
                try:
                    end, _ = await listening.accept()
                except OSError as error:
                    connections.release()
                    log.error("the socket for GPU clients accepts no connections: %s: retrying in 1 s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(self._serve, end, connections)

    async def _serve(self, end: trio.socket.SocketType, connections: trio.Semaphore) -> None:
        channel = Channel(socket.socket(fileno=end.detach()))
        try:
            pid, uid = channel.peer()
            with self._admit(uid) as admitted:
                if admitted:
                    await self._answer(channel, holder_of(uid, pid))
                else:
                    await channel.refuse({"error": "this user has too many connections", "kind": "InUseError"})
        except (ChannelClosedError, OSError):
            pass  # the client has gone
        except Exception:  # a bug: it ends this connection, not the server
            log.exception("a connection of a GPU client failed")
        finally:
            channel.close()
            connections.release()

    @contextmanager
    def _admit(self, uid: int) -> Iterator[bool]:
        """Count a connection of a user during the block; False when the user has too many."""
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
            with trio.move_on_after(PATIENCE_S):  # this server may still be adopting the copy of an earlier one
                await given.copy.done.wait()
        if given is None or not given.copy.ready or given.copy.descriptor is None:
            await channel.send({"error": "no lease has this token", "kind": "NoSuchEntryError"})
        elif not self._may_share(given.holder.uid, holder.uid):
            log.warning("uid %d presented a token of uid %d: refused", holder.uid, given.holder.uid)
            await channel.send({"error": "the token belongs to another user", "kind": "NotPermittedError"})
        else:
            lease = self._share(given, holder)
            try:
                await channel.send({"size": given.copy.size}, [given.copy.descriptor])
                while True:
                    await _receive(channel)
            finally:
                self._release(lease)


async def _receive(channel: Channel) -> Message:
    """The next message; closes any descriptors that come with it."""
    message, descriptors = await channel.receive()
    for descriptor in descriptors:
        os.close(descriptor)
    return message
