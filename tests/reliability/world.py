"""A store whose objects come, change and go, and that fails at times; what of it is open."""

import errno
import functools
import random
from collections import Counter
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.reliability.driver import Driver
from tests.reliability.model import File, Model, Version

PATHS = ("a", "b", "d/x", "d/y", "e", "e/f")
"""Objects, one of which is sometimes a directory."""
WHICH = st.integers(0, 3)


@functools.cache
def _pool(size: int) -> bytes:
    return random.Random(7).randbytes(size)


class World(RuleBasedStateMachine):
    """What happens around a mount. Which rules there are must not depend on what comes of it."""

    totals: ClassVar[Counter[str]] = Counter()
    """What was done and met, by all machines."""

    driver: Driver

    def start(self, driver: Driver) -> None:
        """Begin with a few objects; for a rule that is run first."""
        self.driver = driver
        self.model = Model(driver.now, ttl_s=driver.ttl_s, slack_s=driver.slack_s)
        self.files: list[File] = []
        self.versions = self.failing_steps = 0
        for path in PATHS[::2]:
            self.put(path, 2, 0)

    @rule(
        path=st.sampled_from(PATHS), chunks=st.sampled_from((0, 1, 1, 2, 3)), more=st.sampled_from((-1, 0, 0, 1, 700))
    )
    def put(self, path: str, chunks: int, more: int) -> None:
        """Make an object or replace it, also in place of a directory or below what was an object."""
        for other in sorted(self.model.current):
            if other.startswith(f"{path}/") or path.startswith(f"{other}/"):
                self.remove(other)
        size = max(0, chunks * self.driver.chunk_size + more)
        self.versions += 1
        self.totals["replaced"] += path in self.model.current
        shift = self.versions * 16
        version = Version(path, _pool(4 * self.driver.chunk_size + (1 << 20))[shift : shift + size])
        self.driver.write(path, version.content)
        self.model.put(version)

    @rule(path=st.sampled_from(PATHS))
    def delete(self, path: str) -> None:
        """Delete an object, unless hardly any is left."""
        if len(self.model.current) > 2:
            self.remove(path)

    def remove(self, path: str) -> None:
        if path in self.model.current:
            self.driver.remove(path)
            self.model.delete(path)

    @rule(which=WHICH, chunks=st.integers(0, 3))
    def replace(self, which: int, chunks: int) -> None:
        """Replace what somebody has open."""
        for file in self.chosen(which):
            self.put(file.path, chunks, 17)

    @precondition(lambda self: not self.model.failing)
    @rule(number=st.sampled_from((errno.EIO, errno.EACCES)), steps=st.integers(1, 4))
    def fail(self, number: int, steps: int) -> None:
        """The store is away, or refuses the credentials, for some steps."""
        self.driver.fail(number)
        self.model.fail(number)
        self.failing_steps = steps
        self.totals["store fails"] += 1

    def heal(self) -> None:
        """The store is well again."""
        self.driver.heal()
        self.model.heal()

    @invariant()
    def failures_end(self) -> None:
        if self.model.failing:
            self.failing_steps -= 1
            if self.failing_steps < 0:
                self.heal()

    def chosen(self, which: int) -> list[File]:
        """One of the files that are open, if there is any."""
        return [self.files[which % len(self.files)]] if self.files else []
