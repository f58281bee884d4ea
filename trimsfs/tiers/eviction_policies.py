"""Eviction policies: pure functions from the entries of a tier to those that are evicted.

A policy gets the entries that are neither in use nor pinned and the bytes that are needed. It returns victims that
together free as much, or fewer when it evicts no more.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Evictable:
    """What a policy knows of an entry that is neither in use nor pinned.

    ``size`` is what evicting it frees, in bytes. ``last_used`` grows with every use in the tier and ``loaded``
    with every entry that comes into it; ``uses`` counts its uses; ``cost_s`` is about how long it would take to load it
    again, in seconds. ``key`` is that of the object, by which it may be a tenant's.
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
    """Those least recently used."""
    return _first(sorted(entries, key=lambda entry: entry.last_used), needed)


def fifo(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Those that came first."""
    return _first(sorted(entries, key=lambda entry: entry.loaded), needed)


def lcu(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Those least commonly used; of equals, those least recently used."""
    return _first(sorted(entries, key=lambda entry: (entry.uses, entry.last_used)), needed)


def cost(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """Those that cost the least time a byte to load again; of equals, those least recently used."""
    return _first(sorted(entries, key=lambda entry: (entry.cost_s / max(1, entry.size), entry.last_used)), needed)


def flush(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """All that is idle, as soon as anything is needed."""
    return list(entries) if needed > 0 else []


def never(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """None: what does not fit is not kept."""
    del entries, needed
    return []


def eager(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    """All that is idle. A tier with this policy also evicts an entry after its last release."""
    return flush(entries, needed)


POLICIES: dict[str, Policy] = {
    "lru": lru,
    "fifo": fifo,
    "lcu": lcu,
    "cost": cost,
    "flush": flush,
    "never": never,
    "eager": eager,
}


def _first(entries: Iterable[Evictable], needed: int) -> list[Evictable]:
    victims: list[Evictable] = []
    for entry in entries:
        if needed <= 0:
            break
        victims.append(entry)
        needed -= entry.size
    return victims
