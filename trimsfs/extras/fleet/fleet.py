"""A mount's part in its fleet: who the members are, where chunks come from, and whether it takes part."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice

from trimsfs.extras.fleet.fleet_source import Counts, FleetSource
from trimsfs.extras.fleet.member_health import Health, MemberHealth
from trimsfs.extras.fleet.members import Members
from trimsfs.fetch.copier import Copier
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.listen_address import parse_address
from trimsfs.options import MountOptions
from trimsfs.telemetry.model_counters import Labelled
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import ChunkWrites

MOST_MEMBERS = 64
"""Members with bytes of their own in the statistics: those that were asked first."""


@dataclass(slots=True, kw_only=True)
class FleetStatistics(Counts):
    """The counts since the server started. ``on``, ``members`` and ``failing_members`` are of now. Members without
    strikes are not among those of ``member_strikes``."""

    on: int
    members: int
    failing_members: int
    member_received_bytes: Labelled
    member_strikes: Labelled


def _by_member(numbers: dict[str, int]) -> Labelled:
    return Labelled(("member",), {(member,): number for member, number in numbers.items()})


class Fleet:
    """Takes part in the fleet of a mount, unless an operator has turned that off; the *ledger* passes that on.

    `FleetSource` describes *came*.
    """

    def __init__(
        self,
        options: MountOptions,
        copier: Copier,
        writes: ChunkWrites,
        ledger: Ledger,
        *,
        came: Callable[[Blob, int], None],
    ) -> None:
        assert options.fleet is not None
        assert options.fleet_members is not None
        assert options.fleet_listen is not None
        self.name = options.fleet
        self._ledger = ledger
        self.health = Health()
        self.members = Members(options.fleet_members, parse_address(options.fleet_listen))
        self.source = FleetSource(options.fleet, self.members, self.health, copier, writes, came=came)
        self._off = next((record.slot for record in ledger.inherited(RecordKind.FLEET_OFF)), None)
        self.source.on = self._off is None

    @property
    def on(self) -> bool:
        """Whether this host asks other members, and answers them."""
        return self.source.on

    def switch(self, *, on: bool) -> None:
        """Take part from now on, or no more."""
        self.source.on = on
        if not on and self._off is None:
            self._off = self._ledger.add(RecordKind.FLEET_OFF, 0, b"")
        elif on and self._off is not None:
            self._ledger.set_count(self._off, 0)
            self._off = None

    def statistics(self) -> FleetStatistics:
        return FleetStatistics(
            **asdict(self.source.counts),
            on=int(self.on),
            members=len(self.members.addresses),
            failing_members=len(self.health.failing() & self.members.addresses) if self.on else 0,
            member_received_bytes=_by_member(
                {member: health.received_bytes for member, health in islice(self.health.members.items(), MOST_MEMBERS)}
            ),
            member_strikes=_by_member(
                {member: health.strikes for member, health in self.health.members.items() if health.strikes}
            ),
        )

    def facts(self) -> dict[str, object]:
        """What ``trimsfs status`` and the control file ``control`` tell of the fleet."""
        return {
            "name": self.name,
            "on": self.on,
            "me": self.members.me,
            "problem": self.members.problem,
            "members": [self._facts_of(member) for member in sorted(self.members.addresses)],
        }

    def _facts_of(self, member: str) -> dict[str, object]:
        health = self.health.members.get(member, MemberHealth())
        return {
            "address": member,
            "problem": health.problem,
            "rate": health.rate,
            "received_bytes": health.received_bytes,
            "strikes": health.strikes,
        }
