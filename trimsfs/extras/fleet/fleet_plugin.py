"""How a fleet plugs into a server. A mount that belongs to none imports nothing of this package."""

import logging
import ssl
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from trimsfs.control.extra import Admitted, Command, Extra
from trimsfs.control.jobs import Order
from trimsfs.errors import ConfigurationError
from trimsfs.fetch.peers import PeerReader
from trimsfs.fetch.store_requests import StoreSpeed
from trimsfs.options import MountOptions, directories
from trimsfs.origins import ByPath
from trimsfs.server.components import Tiers
from trimsfs.server.environment import Environment
from trimsfs.server.plugin import Core, ServerPlugin
from trimsfs.tiers.blob import Blob

try:
    from trimsfs.extras.fleet.certificates import check_certificate, client_context, files_of
    from trimsfs.extras.fleet.fleet import Fleet
    from trimsfs.extras.fleet.fleet_source import FleetSource
    from trimsfs.extras.fleet.peer_client import PeerClient
    from trimsfs.extras.fleet.serving.chunk_server import ChunkServer
    from trimsfs.extras.fleet.spread import Spreader
except ImportError as error:
    _MISSING: str | None = str(error)
else:
    _MISSING = None

log = logging.getLogger(__name__)

WARM_FLEET = "warm-fleet"


class FleetPlugin(ServerPlugin):
    """This host's part in the fleet of its mount. Raises ConfigurationError, unless the server starts *alone*."""

    def __init__(self, options: MountOptions, *, alone: bool) -> None:
        self._fails: ConfigurationError | None = None
        self._context: ssl.SSLContext | None = None
        self._fleet: Fleet | None = None
        try:
            self._context = _context(options)
        except ConfigurationError as error:
            if not alone:
                raise
            self._fails = error  # a mount outlives the files of its fleet

    def begin(self, options: MountOptions, mountpoint: Path) -> MountOptions:
        """Leave the fleet if this host cannot take part."""
        if self._fails is None:
            return options
        log.error(
            "fleet: this host fetches alone: %s: correct that, then `mountctl restart %s`", self._fails, mountpoint
        )
        return options.model_copy(update={"fleet": None})

    def peer_reader(self, threads: int) -> PeerReader | None:
        """The client of other members."""
        return None if self._context is None else PeerClient(self._context, threads=threads)

    def peers(
        self, options: MountOptions, environment: Environment, tiers: Tiers, speed: ByPath[StoreSpeed]
    ) -> FleetSource | None:
        """The members, before the store."""
        if options.fleet is None:
            return None

        def came(blob: Blob, size: int) -> None:
            speed.of(blob.generation.file).throughput.add(size)

        for store in directories(options):
            log.warning(
                "fleet: store %s is a directory: hosts that see other device and inode numbers there share none of it",
                store,
            )
        self._fleet = Fleet(options, environment.copier, tiers.disk.space, environment.ledger, came=came)
        return self._fleet.source

    def build(self, core: Core) -> Extra:
        """What takes part in the fleet, and serves other members; or why it does not."""
        return FleetPart(self._fleet, core) if self._fleet is not None else _Outside(self._fails)


class _Outside(Extra):
    """A host that cannot take part in its fleet."""

    def __init__(self, problem: ConfigurationError | None) -> None:
        self._problem = problem

    def facts(self) -> Mapping[str, object]:
        """Why it fetches alone."""
        return {"fleet_problem": None if self._problem is None else str(self._problem)}


class FleetPart(Extra):
    """A host that takes part in its fleet."""

    def __init__(self, fleet: Fleet, core: Core) -> None:
        self._fleet = fleet
        environment, blobs, fetcher = core.environment, core.tiers.disk.blobs, core.fetching.fetcher
        self._spreader = Spreader(fleet.source, blobs, fetcher, environment.copier)
        server = ChunkServer(
            core.options,
            core.fetching.namespace,
            blobs,
            fetcher,
            directory=core.tiers.disk.directory,
            chunk_size=environment.chunk_size,
            serving=lambda: fleet.on,
            instance=fleet.members.instance,
        )
        self.services = (fleet.members.run, server.run)
        self.sources = {"fleet": fleet.statistics, "fleet_served": server.statistics}
        self.switches = {f"fleet-{word}": partial(fleet.switch, on=word == "on") for word in ("on", "off")}

    def facts(self) -> Mapping[str, object]:
        """The members, and how they answer."""
        return {"fleet": self._fleet.facts()}

    def command_names(self) -> list[str]:
        """The command that spreads a file over the fleet."""
        return [WARM_FLEET]

    def command(self, order: Order, admitted: Admitted) -> Command | None:
        """What spreads a file; None for other commands."""
        if order.name != WARM_FLEET:
            return None
        return lambda generation, _progress: self._spreader.spread(generation)


def _context(options: MountOptions) -> ssl.SSLContext:
    """What this host connects to members with. Raises ConfigurationError."""
    if _MISSING is not None:
        raise ConfigurationError(f"option fleet {options.fleet}: {_MISSING}: pip install 'trimsfs[fleet]'")
    files = files_of(options)
    context = client_context(*files)
    try:
        check_certificate(*files)
    except ConfigurationError as error:
        log.warning("fleet: other members refuse this host: %s", error)
    return context
