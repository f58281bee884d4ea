"""The serving side of a fleet: other members get chunks of this host's cache through nginx."""

import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from trimsfs.extras.fleet.serving.http_server import HttpServer
from trimsfs.extras.fleet.serving.owner import Owner
from trimsfs.extras.fleet.serving.uploads import Uploads
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.tree import Namespace
from trimsfs.options import FLEET_REPORTS, FLEET_SOCKET, MountOptions
from trimsfs.tiers.disk.interfaces import Inspection

log = logging.getLogger(__name__)

SOCKET_MODE = 0o660
"""Lets nginx in, whose workers have the server's group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedStatistics:
    """Counts since the server started: chunk requests of other members that were given, and refused as busy."""

    sent_requests: int
    sent_bytes: int
    refused_requests: int


class ChunkServer:
    """Answers nginx for the fleet of a mount. `Owner` describes *serving* and *instance*."""

    def __init__(
        self,
        options: MountOptions,
        namespace: Namespace,
        blobs: Inspection,
        fetcher: Fetcher,
        *,
        directory: Path,
        chunk_size: int,
        serving: Callable[[], bool],
        instance: str,
    ) -> None:
        assert options.fleet is not None
        self._directory = directory
        self._uploads = Uploads(options.fleet_upload_limit)
        self._owner = Owner(
            options.fleet,
            namespace,
            blobs,
            fetcher,
            self._uploads,
            directory=directory,
            chunk_size=chunk_size,
            serving=serving,
            instance=instance,
        )

    def statistics(self) -> ServedStatistics:
        return ServedStatistics(
            sent_requests=self._uploads.count,
            sent_bytes=self._uploads.bytes,
            refused_requests=self._uploads.refused,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer nginx until the server stops."""
        with ExitStack() as sockets:
            try:
                self._owner.let_nginx_in()
                reports = sockets.enter_context(_bound(self._directory / FLEET_REPORTS, socket.SOCK_DGRAM))
                listener = sockets.enter_context(_bound(self._directory / FLEET_SOCKET, socket.SOCK_STREAM))
                listener.listen(socket.SOMAXCONN)
            except OSError as error:
                log.error(
                    "fleet: cannot listen in %s: %s: this host sends no chunks: correct that, then `mountctl upgrade`",
                    self._directory,
                    error,
                )
                task_status.started()
                return
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._uploads.run, reports)
                nursery.start_soon(HttpServer(self._owner.answer).run, listener)


def _bound(path: Path, kind: socket.SocketKind) -> socket.socket:
    """A socket at a path, in place of an earlier server's. Raises OSError."""
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        bound.bind(os.fspath(path))
        path.chmod(SOCKET_MODE)
    except OSError:
        bound.close()
        raise
    return bound
