"""What every measurement uses: data, endpoints, contenders, and the table that samples go to."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from tests.benchmarks.children import ChildError, TooSlowError
from tests.benchmarks.contenders import RCLONE_MOUNT, S3FS_MOUNT, Contender, Mount, native, trimsfs
from tests.benchmarks.data import BUCKET, Data
from tests.benchmarks.machine import touch_memory
from tests.benchmarks.results import NATIVE, PEERS, Key, Results
from tests.benchmarks.scale import Scale
from tests.services import ServiceError
from tests.services.fast import FastS3

PROFILE_LATENCY_MS = 25
PROFILE_RATE = 90_000_000
PROFILE_TEXT = "25 ms, 90 MB/s for each connection"

TOUCHED_TIMES = 3
"""For what is loaded, its copy in a cache, and what a program makes of it."""
FAILURES = (ChildError, ServiceError, AssertionError, OSError, LookupError, ValueError, subprocess.SubprocessError)


@dataclass(slots=True)
class Bench:
    """One run. *plain* answers at once, *profile* as a distant store does.

    Before each cold measurement memory is *touched*: so many bytes at most.
    """

    scale: Scale
    work: Path
    data: Data
    plain: FastS3
    profile: FastS3
    console: Console
    touched: int = 0
    results: Results = field(default_factory=Results)

    @property
    def contenders(self) -> list[Contender]:
        """All, in the order of the tables."""
        return [native(self.data.native), trimsfs(), RCLONE_MOUNT, S3FS_MOUNT]

    @property
    def servers(self) -> list[Contender]:
        """Those that fetch."""
        return [contender for contender in self.contenders if contender.name != NATIVE]

    def take(
        self, group: str, case: str, contender: str, names: Sequence[str], measure: Callable[[], Sequence[float]]
    ) -> None:
        """Add one sample of each of *names*, unless this was too slow before; record why there is none.

        A peer may be too slow. Anything else that goes wrong is a failure of the run, which goes on.
        """
        keys = [Key(group, name, case, contender) for name in names]
        known = self.results.series.get(keys[0])
        if known is not None and known.note:
            return
        label = f"{group}: {case}: {contender}: {', '.join(names)}"
        self.console.print(f"[dim]{label}[/dim]", highlight=False)
        try:
            samples = measure()
        except TooSlowError as error:
            note = str(error)
            if contender not in PEERS:
                self.results.failures.append(f"{label}: {note}")
        except FAILURES as error:
            note = "failed"
            self.results.failures.append(f"{label}: {type(error).__name__}: {error}")
        else:
            for key, sample in zip(keys, samples, strict=True):
                self.results.add(key, sample)
            return
        for key in keys:
            self.results.note(key, note)

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A fresh directory on the disk of the data, whose files are emptied at the end.

        They are removed at the end of the run: ext4 without a journal looks long for an inode to use where many were
        deleted a moment ago.
        """
        directory = Path(tempfile.mkdtemp(dir=self.work))
        try:
            yield directory
        finally:
            for parent, _, names in os.walk(directory):
                for name in names:
                    # On a mount that would not go this finds files that it may not change.
                    with suppress(OSError):
                        os.truncate(Path(parent, name), 0)

    @contextmanager
    def mounted(self, contender: Contender, server: FastS3) -> Iterator[Mount]:
        """The contender over an empty cache."""
        with self.directory() as directory, contender.mount(directory, server) as mount:
            yield mount

    @contextmanager
    def cold(self, contender: Contender, relative: Path, server: FastS3) -> Iterator[Mount]:
        """The contender with nothing of *relative* fetched, natively nothing in memory; counts from zero."""
        self.data.heat(relative)
        if contender.name == NATIVE:
            self.data.chill(relative)
        with self.mounted(contender, server) as mount:
            server.reset()
            self.touch(relative)
            yield mount

    def touch(self, relative: Path) -> None:
        """Have memory that this host has written to just now, enough for whoever loads these files."""
        if self.touched:
            touch_memory(min(self.touched, TOUCHED_TIMES * self.data.size(relative)))

    def fetched(self, server: FastS3, relative: Path) -> int:
        """Bytes of an object that the endpoint has sent since its counts were reset."""
        traffic = server.statistics().get(f"{BUCKET}/{relative}")
        return traffic.body_bytes if traffic else 0
