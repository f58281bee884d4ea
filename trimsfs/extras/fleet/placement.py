"""Placement: which members of a fleet a chunk is fetched by first, by rendezvous hashing.

Each member ranks all members for a chunk by a hash of both. Whatever members it leaves out, the others keep their
order: so members that know different lists mostly agree. No two of them ever wait for each other, as none leaves itself
out.
"""

import hashlib
import heapq
from collections.abc import Collection, Mapping
from functools import lru_cache, partial

FIRST, KNOWN_CHUNKS = 8, 4096
"""How many members are remembered of a chunk's ranks, and of how many chunks: hosts ask several times for each."""
_MASK = (1 << 64) - 1


class Placement:
    """The ranks of *members*, which are addresses."""

    def __init__(self, members: Collection[str]) -> None:
        self._seeds = {member: seed_of(member) for member in members}
        self._first = lru_cache(KNOWN_CHUNKS)(partial(_ranked, self._seeds, FIRST))

    def ranked(self, content: int, chunk: int, count: int, *, without: Collection[str] = ()) -> list[str]:
        """The first *count* members for a chunk of a content, by the seed of its token; *without* some."""
        first = self._first(content + chunk)
        if without:
            first = [member for member in first if member not in without]
        if len(first) < min(count, len(self._seeds)):
            seeds = {member: own for member, own in self._seeds.items() if member not in without}
            first = _ranked(seeds, count, content + chunk)
        return first[:count]


def _ranked(seeds: Mapping[str, int], count: int, chunk: int) -> list[str]:
    """The first of some members for a chunk, by their seeds."""
    seed = _mixed(chunk)
    scores = ((_mixed(seed ^ own), member) for member, own in seeds.items())
    return [member for _, member in heapq.nlargest(count, scores)]


def seed_of(name: str) -> int:
    """The number of a member or a content in placements."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _mixed(number: int) -> int:
    """A pseudo-random number of 64 bits: the finalizer of SplitMix64."""
    number &= _MASK
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & _MASK
    return number ^ (number >> 31)
