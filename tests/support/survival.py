"""What goes wrong on purpose, and what readers see of it: `make reliability` prints it as a table."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """What was survived: a line of the table.

    ``errors`` counts what readers met, by the name of the errno; ``allowed`` are those that docs/semantics.md gives for
    such a fault. ``recovery_s`` is the time from the end of the last fault to the first operation that went well, or,
    of faults that nobody should notice, the longest that an operation took; None where no time is of interest.
    """

    fault: str
    injected: int
    operations: int
    errors: Counter[str] = field(default_factory=Counter)
    allowed: Collection[str] = ()
    wrong: int = 0
    recovery_s: float | None = None

    def check(self) -> None:
        """That it was survived: faults came, somebody looked, no byte was wrong, and no error undocumented."""
        assert self.injected > 0, f"{self.fault}: never happened"
        assert self.operations > 0, f"{self.fault}: nobody looked"
        assert self.wrong == 0, f"{self.fault}: {self.wrong} operations gave wrong bytes"
        assert not set(self.errors) - set(self.allowed), f"{self.fault}: {dict(self.errors)}, of which {self.allowed}"

    def row(self) -> list[str]:
        """The cells of its line, as `COLUMNS` names them."""
        errors = ", ".join(f"{number} {name}" for name, number in sorted(self.errors.items())) or "0"
        recovery = "" if self.recovery_s is None else f"{self.recovery_s:.2f} s"
        return [self.fault, str(self.injected), str(self.operations), errors, str(self.wrong), recovery]


COLUMNS = ("fault", "injected", "operations", "errors of readers", "wrong bytes", "recovery")

Survived = Callable[[Survival], None]
"""The fixture ``survived``: adds a line to the table, and checks it."""
