"""One bound that trimsfs is held to."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks.results import Results

Formula = Callable[[Results], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A bound on a number: at most, or at least if *least*. Numbers are shown multiplied by *factor*, with *unit*."""

    name: str
    description: str
    formula: Formula
    bound: float
    least: bool = False
    unit: str = "x"
    factor: float = 1

    def met(self, value: float) -> bool:
        """Whether a number keeps to the bound."""
        return value >= self.bound if self.least else value <= self.bound

    def text(self, value: float) -> str:
        """A number as it is shown."""
        return f"{value * self.factor:.4g} {self.unit}".rstrip()

    @property
    def bound_text(self) -> str:
        """The bound as it is shown."""
        return f"{'≥' if self.least else '≤'} {self.text(self.bound)}"
