from hypothesis import given
from hypothesis import strategies as st

from trimsfs.eviction import Evictable, lru

ENTRIES = st.lists(
    st.builds(Evictable, name=st.text(max_size=3), size=st.integers(0, 100), last_used=st.integers(0, 1000)),
    unique_by=lambda entry: entry.last_used,
    max_size=30,
)


@given(ENTRIES, st.integers(-10, 4000))
def test_what_is_kept_was_used_after_every_victim(entries: list[Evictable], needed: int) -> None:
    victims = lru(entries, needed)
    kept = [entry for entry in entries if entry not in victims]
    assert all(victim.last_used < entry.last_used for victim in victims for entry in kept)


@given(ENTRIES, st.integers(1, 4000))
def test_victims_are_as_many_as_needed_and_no_more(entries: list[Evictable], needed: int) -> None:
    victims = lru(entries, needed)
    freed = sum(victim.size for victim in victims)
    if freed < needed:
        assert len(victims) == len(entries)
    else:
        assert freed - victims[-1].size < needed


@given(ENTRIES, st.integers(max_value=0))
def test_nothing_is_evicted_for_nothing(entries: list[Evictable], needed: int) -> None:
    assert lru(entries, needed) == []


def test_victims_come_least_recently_used_first_whatever_the_order_of_entries() -> None:
    old, middle, new = (Evictable(name=str(n), size=10, last_used=n) for n in range(3))
    assert lru([new, old, middle], 15) == [old, middle]
