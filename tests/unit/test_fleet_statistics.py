"""What a host tells of its fleet in numbers, however many members it asks."""

from typing import Any

from trimsfs.extras.fleet.fleet import MOST_MEMBERS, Fleet
from trimsfs.fetch.peers import PeerAnswer
from trimsfs.handover.ledger import Ledger
from trimsfs.options import MountOptions


async def test_the_numbers_of_single_members_are_bounded() -> None:
    nothing: Any = None
    options = MountOptions(
        fleet="models",
        fleet_members="10.0.0.1:7443",
        fleet_listen="10.0.0.1:7443",
        fleet_ca="/ca.pem",
        fleet_cert="/fleet.pem",
        fleet_key="/fleet.key",
    )
    fleet = Fleet(options, nothing, nothing, Ledger(), came=lambda _blob, _size: None)
    for number in range(2 * MOST_MEMBERS):
        fleet.health.answered(f"{number}:7443", PeerAnswer(outcome="ok", received=number))
    fleet.health.of("100:7443").strikes = 2
    numbers = fleet.statistics()
    assert numbers.member_received_bytes.values == {(f"{number}:7443",): number for number in range(MOST_MEMBERS)}
    assert numbers.member_strikes.values == {("100:7443",): 2}
