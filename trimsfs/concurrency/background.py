"""Background tasks, which outlive the calls that start them."""

from collections.abc import Awaitable, Callable
from typing import TypeVarTuple

import trio

Ts = TypeVarTuple("Ts")


class Background:
    """Runs tasks while `run` runs; its end cancels them."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run started tasks until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    @property
    def running(self) -> bool:
        """Whether tasks can be started."""
        return self._nursery is not None

    def start(self, function: Callable[[*Ts], Awaitable[object]], *arguments: *Ts) -> None:
        """Start a task. Call it only while `running`."""
        assert self._nursery is not None
        self._nursery.start_soon(function, *arguments)
