"""The part of the assembly for a mount that belongs to a fleet. A mount that does not never imports it."""

from trimsfs.control import metrics
from trimsfs.fetch.speed import StoreSpeed
from trimsfs.fleet.chunk_server import ChunkServer
from trimsfs.fleet.fleet import Fleet
from trimsfs.options import MountOptions
from trimsfs.origins import ByPath
from trimsfs.server.components import Fetching, Service, Tiers
from trimsfs.server.environment import Environment
from trimsfs.tiers.blob import Blob


class FleetPart:
    """The components of a mount's fleet."""

    def __init__(
        self, options: MountOptions, environment: Environment, tiers: Tiers, speed: ByPath[StoreSpeed]
    ) -> None:
        def came(blob: Blob, size: int) -> None:
            speed.of(blob.generation.file).throughput.add(size)

        self._options = options
        self._disk = tiers.disk
        self.fleet = Fleet(options, environment.copier, tiers.disk, environment.ledger, came=came)

    def complete(self, fetching: Fetching) -> tuple[list[Service], dict[str, metrics.Source]]:
        """Build what needs the fetcher; the services, and the sources of metrics."""
        server = ChunkServer(
            self._options, fetching.namespace, self._disk, fetching.fetcher, serving=lambda: self.fleet.on
        )
        sources: dict[str, metrics.Source] = {"fleet": self.fleet.statistics, "fleet_served": server.statistics}
        return [self.fleet.run, server.run], sources
