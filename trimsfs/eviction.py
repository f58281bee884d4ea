"""Which entries of a tier to give up: pure functions from entries to victims."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Evictable:
    """What a policy knows of an entry that is neither in use nor pinned.

    ``size`` is what evicting it frees, in bytes; ``last_used`` grows with every use in the tier.
    """

    name: str
    size: int
    last_used: int


def lru(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """The least recently used entries that together free *needed* bytes, or all of them."""
    victims: list[Evictable] = []
    for entry in sorted(entries, key=lambda entry: entry.last_used):
        if needed <= 0:
            break
        victims.append(entry)
        needed -= entry.size
    return victims
