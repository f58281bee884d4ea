"""The part of the assembly for a mount that belongs to a fleet. A mount that does not never imports it."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from trimsfs.control import metrics
from trimsfs.extras.fleet.fleet import Fleet
from trimsfs.extras.fleet.serving.chunk_server import ChunkServer
from trimsfs.extras.fleet.source import FleetSource
from trimsfs.extras.fleet.spread import Spreader
from trimsfs.fetch.store_requests import StoreSpeed
from trimsfs.options import MountOptions, directories
from trimsfs.origins import ByPath
from trimsfs.server.components import Fetching, Service, Tiers
from trimsfs.server.environment import Environment
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation

log = logging.getLogger(__name__)


class FleetPart:
    """The components of a mount's fleet."""

    def __init__(
        self, options: MountOptions, environment: Environment, tiers: Tiers, speed: ByPath[StoreSpeed]
    ) -> None:
        def came(blob: Blob, size: int) -> None:
            speed.of(blob.generation.file).throughput.add(size)

        for store in directories(options):
            log.warning(
                "fleet: store %s is a directory: hosts that see other device and inode numbers there share none of it",
                store,
            )
        self._options = options
        self._environment = environment
        self._disk = tiers.disk
        self._fleet = Fleet(options, environment.copier, tiers.disk, environment.ledger, came=came)

    @property
    def source(self) -> FleetSource:
        """Where chunks come from."""
        return self._fleet.source

    def facts(self) -> dict[str, object]:
        """What the control file ``control`` tells of the fleet."""
        return self._fleet.facts()

    @property
    def switches(self) -> dict[str, Callable[[], None]]:
        """The control files that turn the fleet on and off."""
        return {f"fleet-{word}": partial(self._fleet.switch, on=word == "on") for word in ("on", "off")}

    def spreading(self, fetching: Fetching) -> Callable[[Generation], Awaitable[None]]:
        """The function that spreads a file over the fleet."""
        return Spreader(self.source, self._disk, fetching.fetcher, self._environment.copier).spread

    def complete(self, fetching: Fetching) -> tuple[list[Service], dict[str, metrics.Source]]:
        """Build what serves other members; the services, and the sources of metrics."""
        server = ChunkServer(
            self._options,
            fetching.namespace,
            self._disk,
            fetching.fetcher,
            serving=lambda: self._fleet.on,
            instance=self._fleet.members.instance,
        )
        sources: dict[str, metrics.Source] = {"fleet": self._fleet.statistics, "fleet_served": server.statistics}
        return [self._fleet.run, server.run], sources
