"""How long the model is tried: a while in CI, always the same way; for long and at random; and what has failed before.

What a long run finds is in `.hypothesis/examples`, and is tried first by the next one. What is copied from there to
`tests/reliability/examples` is tried in CI for ever. It means the same for as long as the rules are not changed; the
defect itself has a test of its own beside those of the part that had it.
"""

import os
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase, MultiplexedDatabase, ReadOnlyDatabase

KNOWN = ReadOnlyDatabase(DirectoryBasedExampleDatabase(Path(__file__).with_name("examples")))
FOUND = DirectoryBasedExampleDatabase(Path(".hypothesis/examples"))

QUICK = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    stateful_step_count=40,
)
KNOWN_FAILURES = settings(QUICK, derandomize=False, database=KNOWN, phases=[Phase.reuse])
LONG = settings(
    QUICK,
    derandomize=False,
    database=MultiplexedDatabase(FOUND, KNOWN),
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "1500")),
)
