import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.eviction_policies import (
    NAMES,
    Evictable,
    Policy,
    cost,
    eager,
    fifo,
    flush,
    lcu,
    lru,
    never,
    others_first,
    policy_named,
)
from trimsfs.options import MountOptions


def some(rows: list[tuple[int, int, int, int, float]]) -> list[Evictable]:
    return [
        Evictable(name=str(number), size=size, last_used=last_used, loaded=loaded, uses=uses, cost_s=cost_s)
        for number, (size, last_used, loaded, uses, cost_s) in enumerate(rows)
    ]


ENTRIES = st.lists(
    st.tuples(
        st.integers(0, 100), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 5), st.sampled_from([0.0, 1, 5])
    ),
    unique_by=(lambda row: row[1], lambda row: row[2]),
    max_size=15,
).map(some)
NEEDED = st.integers(1, 1500)

ALL = {name: policy_named(name) for name in NAMES}

Key = Callable[[Evictable], tuple[float, ...]]
ORDERED: dict[str, tuple[Policy, Key]] = {
    "lru": (lru, lambda entry: (entry.last_used,)),
    "fifo": (fifo, lambda entry: (entry.loaded,)),
    "lcu": (lcu, lambda entry: (entry.uses, entry.last_used)),
    "cost": (cost, lambda entry: (entry.cost_s / max(1, entry.size), entry.last_used)),
}
"""The policies that give up one entry after the other, and the order in which they do."""

ordered = pytest.mark.parametrize(("policy", "key"), ORDERED.values(), ids=ORDERED)


def entry(
    name: str, *, size: int = 10, last_used: int = 0, loaded: int = 0, uses: int = 0, cost_s: float = 0.0
) -> Evictable:
    return Evictable(name=name, size=size, last_used=last_used, loaded=loaded, uses=uses, cost_s=cost_s)


def names(victims: list[Evictable]) -> str:
    return "".join(victim.name for victim in victims)


# All policies


@pytest.mark.parametrize("tier", ["disk", "host", "gpu"])
def test_every_policy_can_be_chosen_and_nothing_else(tier: str) -> None:
    for name, policy in ALL.items():
        for chosen in (name, f"{tier}={name}", {tier: name}):
            options = MountOptions.model_validate({"eviction": chosen})
            assert ALL[getattr(options.eviction, tier)] is policy
    for unknown in ("random", f"{tier}=random", {tier: "random"}):
        with pytest.raises(ValueError, match=r"random is no eviction policy: write lru, .* or "):
            MountOptions.model_validate({"eviction": unknown})


ADDED = """
from trimsfs import extras
extras.PLUGINS["eviction"]["mine"] = "trimsfs.eviction_policies:fifo"
from click.testing import CliRunner
from trimsfs.cli.mount import mount
from trimsfs.eviction_policies import fifo, lru, policy_named
from trimsfs.options import load_options
eviction = load_options({"eviction": "disk=mine"}, environment={}).eviction
assert (policy_named(eviction.disk), policy_named(eviction.gpu)) == (fifo, lru)
assert ", mine." in " ".join(CliRunner().invoke(mount, ["--help"]).output.split())
"""


def test_a_policy_that_is_listed_can_be_chosen_and_is_in_the_help() -> None:
    subprocess.run([sys.executable, "-c", ADDED], check=True, timeout=60)


@pytest.mark.parametrize("policy", ALL.values(), ids=ALL)
@given(entries=ENTRIES, needed=st.integers(-10, 1500))
def test_victims_are_some_of_the_entries_each_once_and_none_for_nothing(
    policy: Policy, entries: list[Evictable], needed: int
) -> None:
    victims = policy(iter(entries), needed)
    assert len({victim.name for victim in victims}) == len(victims)
    assert set(victims) <= set(entries)
    assert needed > 0 or victims == []


# One entry after the other


@ordered
@given(entries=ENTRIES, needed=NEEDED)
def test_victims_are_as_many_as_needed_in_the_order_of_the_policy(
    policy: Policy, key: Key, entries: list[Evictable], needed: int
) -> None:
    victims = policy(entries, needed)
    kept = [entry for entry in entries if entry not in victims]
    assert victims == sorted(victims, key=key)
    assert all(key(victim) <= key(other) for victim in victims for other in kept)
    freed = sum(victim.size for victim in victims)
    assert kept == [] if freed < needed else freed - victims[-1].size < needed


def test_the_least_commonly_used_go_first_and_the_older_of_equals() -> None:
    entries = [
        entry("a", uses=5, last_used=1),
        entry("b", uses=1, last_used=9),
        entry("c", uses=1, last_used=8),
        entry("d", uses=2, last_used=0),
    ]
    assert names(lcu(entries, 35)) == "cbda"


def test_what_is_cheap_to_load_again_goes_first_by_the_byte() -> None:
    entries = [
        entry("small", size=10, cost_s=0.1),  # much for its few bytes
        entry("large", size=1000, cost_s=1.0),
        entry("huge", size=10_000, cost_s=2.0),
        entry("empty", size=0, cost_s=0.0, last_used=1),
    ]
    assert [victim.name for victim in cost(entries, 100_000)] == ["empty", "huge", "large", "small"]


# All or nothing


@pytest.mark.parametrize("policy", [flush, eager])
@given(entries=ENTRIES, needed=NEEDED)
def test_flushing_gives_up_everything_for_the_least_need_and_never_nothing(
    policy: Policy, entries: list[Evictable], needed: int
) -> None:
    assert policy(entries, needed) == entries
    assert never(entries, needed) == []


# In a fleet


def test_what_only_other_hosts_wanted_goes_first() -> None:
    entries = [
        entry("a", last_used=1, uses=3),
        entry("b", last_used=9),
        entry("c", last_used=2, uses=1),
        entry("d", last_used=8),
    ]
    assert names(others_first(lru)(entries, 5)) == "d"
    assert names(others_first(lru)(entries, 20)) == "db"
    assert names(others_first(lru)(entries, 25)) == "dba"
    assert names(others_first(lru)(entries, 100)) == "dbac"


@given(entries=ENTRIES, needed=NEEDED)
def test_a_fleet_gives_up_as_many_bytes(entries: list[Evictable], needed: int) -> None:
    freed = sum(victim.size for victim in others_first(lru)(iter(entries), needed))
    assert freed >= min(needed, sum(each.size for each in entries))
