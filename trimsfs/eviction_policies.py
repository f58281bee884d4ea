"""Eviction policies: pure functions that choose which entries of a tier to evict.

A policy gets the idle entries, which are neither in use nor pinned, and the number of bytes needed. It returns victims
that together free as much, or fewer if it evicts no more.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trimsfs.plugins import load, plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class Evictable:
    """An idle entry, as a policy sees it.

    ``size`` is the bytes that its eviction frees. ``last_used`` grows with every use in the tier, ``loaded`` with every
    entry that enters it. ``uses`` counts the entry's uses. ``cost_s`` estimates the seconds to load it again. ``key``
    is the key of its object, which decides the tenant.
    """

    name: str
    size: int
    last_used: int
    loaded: int = 0
    uses: int = 0
    cost_s: float = 0.0
    key: str = ""


Policy = Callable[[Iterable[Evictable], int], list[Evictable]]


def lru(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Evict the least recently used entries."""
    return enough_of(sorted(entries, key=lambda entry: entry.last_used), needed)


def fifo(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Evict the entries loaded first."""
    return enough_of(sorted(entries, key=lambda entry: entry.loaded), needed)


def lcu(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Evict the least commonly used entries; among equals, the least recently used."""
    return enough_of(sorted(entries, key=lambda entry: (entry.uses, entry.last_used)), needed)


def cost(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Evict the entries quickest to load again, per byte; among equals, the least recently used."""
    return enough_of(sorted(entries, key=lambda entry: (entry.cost_s / max(1, entry.size), entry.last_used)), needed)


def flush(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Evict all idle entries as soon as any space is needed."""
    return list(entries) if needed > 0 else []


def never(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Evict nothing: chunks that do not fit are served uncached."""
    del entries, needed
    return []


def eager(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Evict all idle entries. A tier with this policy also evicts each entry after its last release."""
    return flush(entries, needed)


POLICIES: dict[str, Policy] = {policy.__name__: policy for policy in (lru, fifo, lcu, cost, flush, never, eager)}
_PLUGGED = plugins("eviction")
NAMES = (*POLICIES, *_PLUGGED)
"""What the option ``eviction`` accepts: the policies above, and those that extras add."""


def policy_named(name: str) -> Policy:
    """The policy of a name. That of an extra is imported on the first call."""
    if name in POLICIES:
        return POLICIES[name]
    added: Policy = load(_PLUGGED[name])
    return added


def others_first(policy: Policy) -> Policy:
    """The same policy, which chooses first among entries that nobody on this host has used: only other hosts of the
    fleet wanted them."""

    def choose(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
        entries = list(entries)
        victims = policy([entry for entry in entries if not entry.uses], needed)
        needed -= sum(victim.size for victim in victims)
        return victims + (policy([entry for entry in entries if entry.uses], needed) if needed > 0 else [])

    return choose


def enough_of(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """The first entries, until they free what is needed."""
    victims: list[Evictable] = []
    for entry in entries:
        if needed <= 0:
            break
        victims.append(entry)
        needed -= entry.size
    return victims
