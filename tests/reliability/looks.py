"""Looks at all files of a mount while something is wrong with its cache, and at when the cache works again."""

import errno
import random
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.reliability.scenes import command
from tests.support.keepers import keeper
from tests.support.mounts import MountedStore
from tests.support.survival import Survived

SIZES = (9 << 20, 2 << 20, 300_000, 5)
MODELS = 4
HANG_S = 30.0
"""An operation that takes longer hangs."""
WORKS_AGAIN_S = 30.0


def models_in(store: Path, sizes: Sequence[int] = SIZES) -> Path:
    """Fill a directory with models of some files each."""
    draw = random.Random(7)
    for model in range(MODELS):
        (store / f"model-{model}").mkdir()
        for number, size in enumerate(sizes):
            (store / f"model-{model}/part-{number}").write_bytes(draw.randbytes(size + model))
    return store


class Looks:
    """Counts what reading a mount gives, beside the directory that it shows."""

    def __init__(self, mount: MountedStore, store: Path) -> None:
        self.mount = mount
        self._store = store
        self.operations = 0
        self.errors = Counter[str]()
        self.wrong: list[str] = []
        self.slowest_s = 0.0

    def read(self, *names: str) -> int:
        """Read files to their ends, all if none is named; how many could not be."""
        failed = 0
        for name in names or [str(path.relative_to(self._store)) for path in sorted(self._store.rglob("part-*"))]:
            with self._operation():
                if (self.mount.path / name).read_bytes() != (self._store / name).read_bytes():
                    self.wrong.append(f"{name} at {time.strftime('%H:%M:%S')}")
                continue
            failed += 1
        return failed

    def until_all_can_be_read(self) -> float:
        """Read all, again and again, until nothing fails; how long that took."""
        began = time.monotonic()
        while self.read():
            assert time.monotonic() - began < WORKS_AGAIN_S, dict(self.errors)
            time.sleep(0.1)
        return time.monotonic() - began

    def until_kept(self, name: str) -> float:
        """Have a file fetched anew, again and again, until it is on the disk; how long that took."""
        began = time.monotonic()
        while not self._kept(name):
            assert time.monotonic() - began < WORKS_AGAIN_S, f"{name} is not kept"
            time.sleep(0.1)
        return time.monotonic() - began

    def _kept(self, name: str) -> bool:
        path, here = self.mount.path / name, 0
        with self._operation():
            try:
                command(path, "evict")
                command(path, "warm-disk")
                here = self.mount.info(name)["residency"]["disk"]
            except OSError as error:
                if error.errno != errno.ESTALE:  # as documented of what was asked of a server that has ended
                    raise
        return bool(here == (self._store / name).stat().st_size)

    @contextmanager
    def _operation(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except OSError as error:
            self.errors[errno.errorcode.get(error.errno or 0, "defect")] += 1
        self.operations += 1
        took = time.monotonic() - began
        assert took < HANG_S, f"took {took:.0f} s"
        self.slowest_s = max(self.slowest_s, took)

    def check(
        self,
        survived: Survived,
        fault: str,
        *,
        injected: int = 1,
        allowed: Collection[str] = (),
        recovery_s: float | None = None,
    ) -> None:
        """Make what was seen a line of the table; no defect is in the log."""
        assert "Traceback" not in self.mount.log()
        survived(
            fault,
            injected=injected,
            operations=self.operations,
            errors=self.errors,
            allowed=allowed,
            wrong=len(self.wrong),
            recovery_s=recovery_s,
        )


def restarts(mount: MountedStore) -> int:
    """How many servers of a mount have been followed by another."""
    number: int = keeper(mount)["restarts"]
    return number
