"""How an extra takes part in a server: before the process drops privileges, in fetch processes, and in the assembly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimsfs.control.extra import Extra
from trimsfs.fetch.peers import PeerReader, Peers
from trimsfs.fetch.store_requests import StoreSpeed
from trimsfs.options import MountOptions
from trimsfs.origins import ByPath
from trimsfs.plugins import load, plugins
from trimsfs.server.components import Fetching, Tiers
from trimsfs.server.environment import Environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """The components that an extra builds on."""

    options: MountOptions
    environment: Environment
    tiers: Tiers
    fetching: Fetching


class ServerPlugin:
    """An extra in a server process. It loads what it needs when it is made, before privileges are dropped.

    Each method adds nothing, unless an extra overrides it.
    """

    def writable(self) -> Sequence[Path]:
        """The paths outside the cache directory that it writes to."""
        return ()

    def begin(self, options: MountOptions, mountpoint: Path) -> MountOptions:
        """The options that count once the keeper has promoted this process: an extra that cannot work may leave."""
        del mountpoint
        return options

    def peer_reader(self, threads: int) -> PeerReader | None:
        """What reads from other hosts in a fetch process; None if that never happens."""
        del threads
        return None

    def peers(
        self, options: MountOptions, environment: Environment, tiers: Tiers, speed: ByPath[StoreSpeed]
    ) -> Peers | None:
        """Where chunks come from before the store is asked; None for nowhere."""
        del options, environment, tiers, speed
        return None

    def build(self, core: Core) -> Extra:
        """Its part of the server. Called once, after `peers`."""
        del core
        return Extra()


def load_plugins(options: MountOptions, *, alone: bool) -> list[ServerPlugin]:
    """Load the extras of a mount: all but those whose option, of the same name, is not set. Raises ConfigurationError.

    If an extra does not work, a server that starts *alone*, for a mount that has none, does without it.
    """
    places = {name: place for name, place in plugins("server").items() if getattr(options, name, name) is not None}
    return [load(place)(options, alone=alone) for place in places.values()]
