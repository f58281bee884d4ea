"""Late binding: calls from a component to one that can only be built after it."""

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LateCalls:
    """A group of late-bound calls. `check` them before the server uses any."""

    def __init__(self) -> None:
        self.members: list[LateBound[..., Any]] = []

    def check(self) -> None:
        """Raises RuntimeError if a call is not bound: a component would find out only when it makes it."""
        unbound = [call.name for call in self.members if call.function is None]
        if unbound:
            raise RuntimeError(f"not bound: {', '.join(unbound)}")


class LateBound(Generic[P, T]):
    """A function that components get before it exists, in a *group*. An early call or a second `bind` raises
    RuntimeError."""

    def __init__(self, group: LateCalls, name: str) -> None:
        self.name = name
        self.function: Callable[P, T] | None = None
        group.members.append(self)

    def bind(self, function: Callable[P, T]) -> None:
        """Make later calls go to *function*."""
        if self.function is not None:
            raise RuntimeError(f"{self.name} is bound already")
        self.function = function

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> T:
        if self.function is None:
            raise RuntimeError(f"{self.name} is called before it is bound")
        return self.function(*arguments, **options)
