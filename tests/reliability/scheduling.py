"""Runs in which a seed decides everything: which task goes on, when a thread's work is done, what time it is.

Trio draws the order of its tasks from a generator of its own, in the way that it does for Hypothesis. Threads would be
another source of chance, so what the server hands to one is done in the event loop, at once, at a moment drawn between
the call and its return. That two threads meet inside of what they do is thus left out: real mounts show that.
"""

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar, TypeVarTuple, cast
from unittest import mock

import hypothesis  # makes trio's scheduler go by its generator alone
import trio
from trio._core import _run
from trio.testing import MockClock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

assert hypothesis
STEPS = (0, 0, 0, 1, 1, 2, 3, 8)
"""How many other turns pass before or after what a thread does."""
PAUSES = 0.03
"""The share of what threads do that takes time as well, up to LONGEST_PAUSE_S."""
LONGEST_PAUSE_S = 0.05
POLLED_EVERY_S = 0.002
"""What a thread that sleeps takes of the time that passes here."""


class _InLoop:
    """Does what a thread would, between two moments drawn at random."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._limiter = trio.CapacityLimiter(40)

    async def run_sync(
        self,
        function: Callable[[*Ts], T],
        *arguments: *Ts,
        abandon_on_cancel: bool = False,
        limiter: trio.CapacityLimiter | None = None,
    ) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        limiter = limiter or self._limiter
        thread = object()
        await limiter.acquire_on_behalf_of(thread)
        try:
            with trio.CancelScope(shield=not abandon_on_cancel):
                await self._pass()
            try:
                if cast(object, function) is time.sleep:
                    await trio.sleep(POLLED_EVERY_S)
                    return None  # type: ignore[return-value]
                return function(*arguments)
            finally:
                with trio.CancelScope(shield=True):
                    await self._pass()
        finally:
            limiter.release_on_behalf_of(thread)

    async def _pass(self) -> None:
        for _ in range(self._draw.choice(STEPS)):
            await trio.lowlevel.cancel_shielded_checkpoint()
        if self._draw.random() < PAUSES:
            await trio.sleep(self._draw.uniform(0, LONGEST_PAUSE_S))
        await trio.lowlevel.checkpoint_if_cancelled()


Concerned = Callable[[trio.lowlevel.Task], bool]


class at(trio.abc.Instrument):  # noqa: N801 - reads as what it does
    """Does something once tasks of a kind have taken so many steps: at the await where the last one ended."""

    def __init__(self, step: int, concerned: Concerned, action: Callable[[], object]) -> None:
        self._left, self._concerned, self._action = step, concerned, action

    def __enter__(self) -> Self:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)

    @property
    def came(self) -> bool:
        """Whether there were so many steps."""
        return self._left <= 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._left > 0 and self._concerned(task):
            self._left -= 1
            if self._left == 0:
                self._action()


@contextmanager
def without_threads(draw: random.Random) -> Iterator[None]:
    """What is handed to a thread is done in the event loop, at a moment drawn."""
    with mock.patch.object(trio.to_thread, "run_sync", _InLoop(draw).run_sync):
        yield


@contextmanager
def about(what: str) -> Iterator[None]:
    """Add to what fails what it was about."""
    try:
        yield
    except BaseException as error:
        error.add_note(what)
        raise


def scheduled(seed: int, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
    """Run an async function as the seed decides; time passes only while nothing else can happen."""
    _run._r.seed(seed)
    state = random.getstate()
    random.seed(seed)  # waits between attempts
    try:
        with about(f"seed {seed}"), without_threads(random.Random(seed)):
            return trio.run(function, *arguments, clock=MockClock(autojump_threshold=0))
        raise AssertionError("unreachable: nothing is swallowed")
    finally:
        random.setstate(state)
