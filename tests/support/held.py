"""Calls that a test holds up, or begins and looks at later."""

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar, TypeVarTuple

import pytest
import trio

from tests.support.parts import until
from trimsfs.errors import TrimsError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Held:
    """Holds calls of ``target.name`` in their threads until ``go`` is set: all, or the first *times*.

    They wait before they do their work, or *after* it. ``began`` is set once one waits, ``calls`` counts them.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, target: object, name: str, *, times: float = float("inf"), after: bool = False
    ) -> None:
        self.calls = 0
        self.began, self.go = threading.Event(), threading.Event()
        real = getattr(target, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            waits = self.calls <= times
            result = real(*arguments, **options) if after or not waits else None
            self.began.set()
            if waits:
                assert self.go.wait(20)
            return result if after or not waits else real(*arguments, **options)

        patch.setattr(target, name, call)

    async def reached(self) -> None:
        """Return once a call waits."""
        await until(self.began.is_set)


async def reached(gate: trio.Event) -> None:
    """Return once a task waits at a gate."""
    await until(lambda: gate.statistics().tasks_waiting > 0)


def begin(nursery: trio.Nursery, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> list[T]:
    """Call a function in a task; its result comes into the list that is returned."""
    results: list[T] = []

    async def call() -> None:
        results.append(await function(*arguments))

    nursery.start_soon(call)
    return results


async def unless_refused(reading: Awaitable[bytes], error: type[TrimsError] = TrimsError) -> bytes | None:
    """What is read; None if that fails with this error."""
    with suppress(error):
        return await reading
    return None
