"""How long the model is tried: a while in CI, always the same way; for long and at random; and what has failed before.

What a long run finds is in `.hypothesis/examples`, and is tried first by the next one. A file that is copied from there
to `tests/reliability/examples` is tried in CI from then on, and means the same for as long as the rules do; the defect
itself has a test of its own beside those of the part that had it.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from tests.support.survival import Survived

DOCUMENTED = ("EACCES", "EFAULT", "EIO", "EISDIR", "ENOENT", "ENOTDIR", "ESTALE")
FOUND = DirectoryBasedExampleDatabase(Path(".hypothesis/examples"))


class Known(ExampleDatabase):
    """Sequences that have failed once, whatever test asks for them: a file each, which nobody deletes."""

    def fetch(self, key: bytes) -> Iterator[bytes]:
        if not key.endswith((b".secondary", b".pareto")):
            yield from (path.read_bytes() for path in sorted(Path(__file__).with_name("examples").glob("*")))

    def save(self, key: bytes, value: bytes) -> None:
        """They are saved by hand."""

    def delete(self, key: bytes, value: bytes) -> None:
        """They stay."""


QUICK = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    stateful_step_count=40,
)
KNOWN_FAILURES = settings(QUICK, derandomize=False, database=Known(), phases=[Phase.reuse])
LONG = settings(
    QUICK,
    derandomize=False,
    database=FOUND,
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "1500")),
)
LONG_S = 600 + 4 * LONG.max_examples
"""Longer than that it may not take."""


@contextmanager
def survival(fault: str, totals: Counter[str], survived: Survived) -> Iterator[None]:
    """Add what machines do in the block, which they count, to the table."""
    totals.clear()
    yield
    faults = ("restarts", "store fails", "replaced", "evict done")
    survived(
        fault,
        injected=sum(totals[name] for name in faults),
        operations=sum(totals[name] for name in ("opens", "reads", "stats", "listings", *DOCUMENTED)),
        errors=Counter({name: number for name, number in totals.items() if name in DOCUMENTED}),
        allowed=DOCUMENTED,
    )
