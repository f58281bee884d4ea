"""Late answers: work goes on when those who asked for it have given up, and the next who asks gets its result."""

import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")

GRACE_S = 0.5
"""How long a new answer may take before a late one is given in its place."""
KEPT_S = 300.0
"""How long after its question a late answer may be given."""
MOST = 16
"""Most questions that go on, or whose late answers are kept."""


class LateAnswers(Generic[T]):
    """Answers to questions, by key. Each is new, unless a caller has given the same question up. Then later callers
    wait for that answer together. The first of them gets it even if it came in between."""

    def __init__(self) -> None:
        self._late: dict[str, _Question[T]] = {}

    async def of(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """The result of *work*. Raises what that raises."""
        late = self._late.get(key)
        if late is not None and not late.done.is_set():
            await late.done.wait()
            if self._late.get(key) is late:
                del self._late[key]
            return late.answer()
        kept = self._late.pop(key, None)
        if kept is not None and not kept.usable:
            kept = None
        question = _Question(work)
        trio.lowlevel.spawn_system_task(question.run)
        try:
            with trio.move_on_after(math.inf if kept is None else GRACE_S):
                await question.done.wait()
                return question.answer()
        finally:
            if not question.done.is_set():
                self._go_on(key, question)
        assert kept is not None
        return kept.answer()

    def close(self) -> None:
        """Give up what goes on."""
        for question in self._late.values():
            question.scope.cancel()
        self._late.clear()

    def _go_on(self, key: str, question: "_Question[T]") -> None:
        if len(self._late) >= MOST:
            self._late = {other: late for other, late in self._late.items() if not late.done.is_set()}
        if key in self._late or len(self._late) >= MOST:
            question.scope.cancel()
        else:
            self._late[key] = question


class _Question(Generic[T]):
    """One run of the work, in a task of its own."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self._work = work
        self._asked = trio.current_time()
        self._answer: T | Exception | None = None

    async def run(self) -> None:
        with self.scope:
            try:
                self._answer = await self._work()
            except Exception as error:  # raised where the answer is wanted
                self._answer = error
        self.done.set()

    @property
    def usable(self) -> bool:
        """Whether the answer may be given instead of a new one."""
        return not isinstance(self._answer, Exception) and trio.current_time() - self._asked <= KEPT_S

    def answer(self) -> T:
        """The result. Raises what the work has raised."""
        if isinstance(self._answer, Exception):
            raise self._answer
        assert self._answer is not None
        return self._answer
