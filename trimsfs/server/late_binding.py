"""Late binding: calls from a component to one that can only be built after it."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LateBound(Generic[P, T]):
    """A function that components get before it exists. An early call or a second `bind` raises RuntimeError."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._function: Callable[P, T] | None = None

    def bind(self, function: Callable[P, T]) -> None:
        """Make later calls go to *function*."""
        if self._function is not None:
            raise RuntimeError(f"{self._name} is bound already")
        self._function = function

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> T:
        if self._function is None:
            raise RuntimeError(f"{self._name} is called before it is bound")
        return self._function(*arguments, **options)
