"""The priority of a fetch follows who waits for it: programs that compute wait for none that nobody waits for."""

from collections.abc import Callable


class Priority:
    """The priority of some flights: that of ordinary programs or, in the *background*, a low one until it is lifted."""

    def __init__(self, *, background: bool = False) -> None:
        self.background = background
        self._raise: list[Callable[[], None]] = []

    def on_lift(self, function: Callable[[], None]) -> None:
        """Have a function called when a program begins to wait."""
        self._raise.append(function)

    def lift(self) -> None:
        """A program waits from now on."""
        if self.background:
            self.background = False
            for function in self._raise:
                function()
