"""The serving side of a fleet: other members get chunks of this host's cache through nginx."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from trimsfs.fetch.fetcher import Fetcher
from trimsfs.fleet.http_server import HttpServer, listen
from trimsfs.fleet.owner import Owner
from trimsfs.fleet.uploads import Uploads
from trimsfs.namespace.tree import Namespace
from trimsfs.options import FLEET_SOCKET, MountOptions
from trimsfs.tiers.disk.tier import DiskTier

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedStatistics:
    """Counts since the server started: chunk requests of other members that were given, and refused as busy."""

    sent_requests: int
    sent_bytes: int
    refused_requests: int


class ChunkServer:
    """Answers nginx for the fleet of a mount. *serving* tells whether it should."""

    def __init__(
        self,
        options: MountOptions,
        namespace: Namespace,
        disk: DiskTier,
        fetcher: Fetcher,
        *,
        serving: Callable[[], bool],
    ) -> None:
        assert options.fleet is not None
        self._socket = disk.directory / FLEET_SOCKET
        self._uploads = Uploads(options.fleet_upload_limit)
        self._owner = Owner(options.fleet, namespace, disk, fetcher, self._uploads, serving=serving)

    def statistics(self) -> ServedStatistics:
        return ServedStatistics(
            sent_requests=self._uploads.count,
            sent_bytes=self._uploads.bytes,
            refused_requests=self._uploads.refused,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer nginx until the server stops."""
        try:
            self._owner.let_nginx_in()
            listener = listen(self._socket)
        except OSError as error:
            log.error("fleet: cannot listen at %s: %s: this host sends no chunks", self._socket, error)
            task_status.started()
            return
        task_status.started()
        await HttpServer(self._owner.answer).run(listener)
