"""The health of a fleet's members, as this host sees it: who is down, how fast each sends, who sent wrong bytes."""

import logging
import random
import statistics
from collections import deque
from dataclasses import dataclass

import trio

from trimsfs.extras.fleet.protocol import AWAY_S
from trimsfs.fetch.peers import PeerAnswer

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""How long a member that fails is not asked; twice as long after each further failure."""
MOST_DOUBLINGS = 16
"""Of a pause: the power of a larger number is no float any more."""
FAILING_S = 300.0
"""For how long after its pause a member counts as failing, unless it answers."""
REFUSED_PAUSE_S = 30.0
STRIKES = 3
STRIKES_PAUSE_S = 600.0
"""After how many wrong chunks, and for how long, a member is not asked."""
WEIGHT = 0.3
"""Of a new rate in the average."""
RATE_LASTS_S = 30.0
"""How long a rate counts. A member that was slow is asked again then."""
SLOW_BODIES = 2
"""After how many slow bodies in a row a member is asked last: one alone may have had bad luck on a full link."""
FIRST_RATE = 4e6
"""Bytes a second that are expected before any member has sent something."""
PATIENCE, LEAST_PATIENCE_S, MOST_PATIENCE_S = 4.0, 3.0, 60.0
"""How many times as long as expected a chunk may take, and the limits of that."""
WINDOW_S = 10.0
"""Over how long the rate of all that comes is measured."""
_DOWN = {"unreachable", "silent"}


@dataclass(slots=True)
class MemberHealth:
    """What this host knows of a member. ``outstanding`` bytes are asked for and have not come.

    ``rate`` is in bytes a second, from the first byte of a body on: a member that waits for the store is not slow. Of
    its last bodies, ``slow`` were given up as too slow. Its strikes have it down until ``banned_until``, whatever it
    answers to requests that were under way.
    """

    outstanding: int = 0
    rate: float | None = None
    rated_at: float = 0.0
    slow: int = 0
    down_until: float = float("-inf")
    banned_until: float = float("-inf")
    failures: int = 0
    strikes: int = 0
    problem: str | None = None
    received_bytes: int = 0


class Health:
    """The health of the members, by address."""

    def __init__(self) -> None:
        self.members: dict[str, MemberHealth] = {}
        self._came: deque[tuple[float, int]] = deque()

    def of(self, member: str) -> MemberHealth:
        return self.members.setdefault(member, MemberHealth())

    def keep(self, members: frozenset[str]) -> None:
        """Forget members that have left."""
        for member in self.members.keys() - members:
            if not self.members[member].outstanding:
                del self.members[member]

    def down(self) -> set[str]:
        """The members not to ask for now: those that have failed of late, and those that one request tries again."""
        now = trio.current_time()
        return {
            member
            for member, health in self.members.items()
            if health.problem is not None and (health.down_until > now or health.outstanding)
        }

    def failing(self) -> set[str]:
        """The members that failed when they were last asked, without those that are drained or off.

        A member is asked again only when a chunk is wanted, so a failure counts for FAILING_S.
        """
        since = trio.current_time() - FAILING_S
        return {member for member, health in self.members.items() if health.failures and health.down_until > since}

    def expected_s(self, member: str, size: int) -> float:
        """An estimate of the seconds until a member has sent *size* bytes more."""
        health = self.of(member)
        return (health.outstanding + size) / (self._recent_rate(health) or self._typical_rate())

    def is_slow(self, member: str) -> bool:
        """Whether the last bodies of a member were given up, not long ago."""
        health = self.of(member)
        return health.slow >= SLOW_BODIES and self._recent_rate(health) is not None

    def patience_s(self, size: int) -> float:
        """How long *size* bytes may take from their first on: all that this host has asked for shares its link."""
        outstanding = sum(health.outstanding for health in self.members.values())
        expected_s = (outstanding + size) / self._rate_of_all()
        return min(MOST_PATIENCE_S, max(LEAST_PATIENCE_S, PATIENCE * expected_s))

    def _rate_of_all(self) -> float:
        """Bytes a second that members together have sent of late."""
        now = trio.current_time()
        while self._came and self._came[0][0] < now - WINDOW_S:
            self._came.popleft()
        if not self._came:
            return FIRST_RATE
        return sum(size for _, size in self._came) / max(1.0, now - self._came[0][0])

    def answered(self, member: str, answer: PeerAnswer) -> None:
        """Learn from the end of a request."""
        health, now = self.of(member), trio.current_time()
        if answer.received:
            self._came.append((now, answer.received))
        if answer.received and answer.body_s > 0:
            rate, before = answer.received / answer.body_s, self._recent_rate(health)
            health.slow = health.slow + 1 if answer.outcome == "slow" else 0
            weight = 1.0 if health.slow else WEIGHT  # whatever it has sent before
            health.rate = rate if before is None else before + weight * (rate - before)
            health.rated_at = now
        match answer.outcome:
            case "damaged":
                self._strikes(member, health, answer)
            case _ if health.banned_until > now:
                pass
            case "unreachable" | "silent":
                self._fails(member, health, answer, FIRST_PAUSE_S * 2 ** min(health.failures, MOST_DOUBLINGS))
            case "refused":
                self._fails(member, health, answer, REFUSED_PAUSE_S)
            case "away":
                health.failures, health.problem = 0, "drained, or off"
                health.down_until = now + AWAY_S
            case _:
                if health.problem is not None:
                    log.info("fleet: %s answers again", member)
                health.failures, health.problem = 0, None
                health.down_until = float("-inf")
        if answer.outcome == "ok":
            health.received_bytes += answer.received

    def _strikes(self, member: str, health: MemberHealth, answer: PeerAnswer) -> None:
        health.strikes += 1
        log.error("fleet: %s sent wrong bytes, strike %d: %s", member, health.strikes, answer.detail)
        if health.strikes % STRIKES == 0:
            self._fails(member, health, answer, STRIKES_PAUSE_S)
            health.banned_until = health.down_until

    def _fails(self, member: str, health: MemberHealth, answer: PeerAnswer, pause_s: float) -> None:
        now = trio.current_time()
        if health.down_until > now and answer.outcome in _DOWN:
            return  # another request has found that out
        reason = answer.detail or answer.outcome
        if not health.failures:
            log.warning("fleet: %s fails, its chunks come from others: %s", member, reason)
        health.problem = reason
        health.failures += 1
        health.down_until = now + min(pause_s, max(LONGEST_PAUSE_S, STRIKES_PAUSE_S * (answer.outcome == "damaged")))

    def _recent_rate(self, health: MemberHealth) -> float | None:
        return health.rate if health.rated_at > trio.current_time() - RATE_LASTS_S else None

    def _typical_rate(self) -> float:
        rates = [rate for health in self.members.values() if (rate := self._recent_rate(health)) is not None]
        return statistics.median(rates) if rates else FIRST_RATE


class RetryBudget:
    """Bounds the requests to the store for chunks that members should have given.

    It allows a share of what they give and, so that no chunk waits for ever, one in REFILL_S seconds. No request waits
    longer than LONGEST_WAIT_S. What a member has no room for takes none.
    """

    SHARE, MOST, REFILL_S, LONGEST_WAIT_S = 0.1, 10.0, 1.0, 15.0

    def __init__(self) -> None:
        self._left = self.MOST
        self._turn = trio.StrictFIFOLock()

    def add(self) -> None:
        """Count a chunk that a member has given."""
        self._left = min(self.MOST, self._left + self.SHARE)

    async def take(self) -> None:
        """Take one request; wait for a turn if none is left. A caller that is cancelled takes none."""
        with trio.move_on_after(self.LONGEST_WAIT_S * random.uniform(0.5, 1)):  # noqa: S311 not all at once
            async with self._turn:
                if self._left >= 1:
                    self._left -= 1
                else:
                    await trio.sleep(self.REFILL_S)
