"""What goes wrong on purpose, and what readers see of it: `make reliability` prints it as a table."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

COLUMNS = ("fault", "injected", "operations", "errors of readers", "wrong bytes", "recovery")
NO_ERRORS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Survived:
    """The fixture ``survived``: each call adds a line to the table, and checks it."""

    record: Callable[[str, object], None]

    def __call__(
        self,
        fault: str,
        *,
        injected: int,
        operations: int,
        errors: Mapping[str, int] = NO_ERRORS,
        allowed: Collection[str] = (),
        wrong: int = 0,
        recovery_s: float | None = None,
    ) -> None:
        """Fail unless faults came, somebody looked, no byte was wrong, and each error is one of those *allowed*.

        *errors* counts what readers met, by the name of the errno; docs/semantics.md gives those *allowed* for such a
        fault. *recovery_s* is the time from the end of the last fault to the first operation that went well, or, of
        faults that nobody should notice, the longest that an operation took; None where no time is of interest.
        """
        met = ", ".join(f"{number} {name}" for name, number in sorted(errors.items())) or "0"
        recovery = "" if recovery_s is None else f"{recovery_s:.2f} s"
        self.record("survived", [fault, str(injected), str(operations), met, str(wrong), recovery])
        assert injected > 0, f"{fault}: never happened"
        assert operations > 0, f"{fault}: nobody looked"
        assert wrong == 0, f"{fault}: {wrong} operations gave wrong bytes"
        assert not set(errors) - set(allowed), f"{fault}: {dict(errors)}, of which {allowed}"
